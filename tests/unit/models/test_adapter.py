# SPDX-License-Identifier: Apache-2.0
"""HFModel: which rows come back, what is captured, what is refused, what is left untouched."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode
from bedplate.contract.attention import AttentionBackend
from bedplate.errors import ContractError, RequestTooLongError
from bedplate.models.adapter import HFModel
from bedplate.models.probe import probe
from bedplate.testing.tiny_models import family, tiny_model

# Upstream quirk (transformers 5.17): some modeling files use torch.jit.script when imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

IDS = (5, 9, 4, 7, 3, 8)
LENGTHS = (4, 2)


class OwnToken(AttentionBackend):
    """Every token attends to itself; enough where attention is not what is tested."""

    def prepare(self, batch):
        pass

    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        return v.repeat_interleave(call.num_heads // call.num_kv_heads, dim=1)

    forward_decode = forward_extend


def a_model(model_type="llama", **options):
    model_class, config = family(model_type)
    module = tiny_model(model_class, config)
    model = HFModel(module, probe(model_class, config), **options)
    model.bind_attention(OwnToken())
    return model


def a_batch(**overrides):
    ints = {"dtype": torch.int32}
    new, none = torch.tensor(LENGTHS, **ints), torch.zeros(2, **ints)
    start = torch.tensor([0, LENGTHS[0]], **ints)
    fields = {
        "mode": ForwardMode.EXTEND,
        "batch_size": 2,
        "input_ids": torch.tensor(IDS),
        "positions": torch.tensor([0, 1, 2, 3, 0, 1]),
        "req_pool_indices": torch.tensor([1, 2], **ints),
        "seq_lens": new,
        "seq_lens_cpu": new,
        "out_cache_loc": torch.arange(4, 10),
        "extend": ExtendPart(
            seq_lens=new, prefix_lens=none, start_loc=start, seq_lens_cpu=new,
            prefix_lens_cpu=none,
        ),
    }  # fmt: skip
    return ForwardBatch(**(fields | overrides))


def test_all_rows_or_the_wanted_ones():
    model = a_model()
    everything = model.forward(a_batch()).next_token_logits
    assert everything.shape == (6, 160)
    rows = torch.tensor([3, 5])
    wanted = model.forward(a_batch(logits_rows=rows)).next_token_logits
    torch.testing.assert_close(wanted, everything[rows])


def test_rows_are_chosen_afterwards_where_the_model_cannot():
    model = a_model()
    expected = model.forward(a_batch()).next_token_logits
    model.spec = dataclasses.replace(model.spec, takes_logits_to_keep=False)
    rows = torch.tensor([5, 0])
    wanted = model.forward(a_batch(logits_rows=rows)).next_token_logits
    torch.testing.assert_close(wanted, expected[rows])


@pytest.mark.parametrize("takes_rows", [True, False])
@pytest.mark.parametrize(
    ("mode", "count"), [(CaptureHiddenMode.LAST, 2), (CaptureHiddenMode.FULL, 6)]
)
def test_hidden_states_are_what_the_head_received(mode, count, takes_rows):
    model = a_model()
    model.spec = dataclasses.replace(model.spec, takes_logits_to_keep=takes_rows)
    rows = torch.tensor([3, 5])
    out = model.forward(a_batch(logits_rows=rows, capture_hidden=mode))
    assert out.next_token_logits.shape == (2, 160)
    assert out.hidden_states.shape == (count, 64)
    states = out.hidden_states if count == 2 else out.hidden_states[rows]
    torch.testing.assert_close(model.module.lm_head(states), out.next_token_logits)
    assert not model.module.lm_head._forward_pre_hooks, "the hook is gone"


def test_a_batch_without_tokens_has_no_rows():
    ints, longs = torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.long)
    batch = a_batch(
        mode=ForwardMode.IDLE, batch_size=0, input_ids=longs, positions=longs,
        req_pool_indices=ints, seq_lens=ints, seq_lens_cpu=ints, out_cache_loc=ints,
        logits_rows=longs, extend=None, capture_hidden=CaptureHiddenMode.FULL,
    )  # fmt: skip
    out = a_model().forward(batch)
    assert out.next_token_logits.shape == (0, 160)
    assert out.hidden_states.shape == (0, 64)


def test_nothing_is_captured_unless_asked():
    assert a_model().forward(a_batch()).hidden_states is None


def test_embeddings_can_replace_ids():
    model = a_model()
    embeds = model.module.get_input_embeddings()(torch.tensor(IDS))
    expected = model.forward(a_batch()).next_token_logits
    given = model.forward(a_batch(input_ids=torch.zeros(6, dtype=torch.long)), embeds)
    torch.testing.assert_close(given.next_token_logits, expected)


def test_positions_are_the_given_ones():
    model = a_model("gpt2")
    first = model.forward(a_batch()).next_token_logits
    moved = model.forward(a_batch(positions=torch.tensor([0, 1, 2, 3, 7, 8])))
    same, changed = moved.next_token_logits[:4], moved.next_token_logits[4:]
    torch.testing.assert_close(same, first[:4])
    assert not torch.allclose(changed, first[4:])


def test_forward_before_attention_is_an_error():
    model_class, config = family("llama")
    model = HFModel(tiny_model(model_class, config), probe(model_class, config))
    with pytest.raises(ContractError, match="bind_attention"):
        model.forward(a_batch())


def test_a_request_beyond_the_limit_is_refused_with_the_numbers():
    model = a_model()
    reason = "rotary embedding would switch"
    limited = dataclasses.replace(model.spec, max_position_embeddings=3, limits=(reason,))
    model.spec = limited
    with pytest.raises(RequestTooLongError, match=f"4 tokens long.*serves 3; {reason}"):
        model.check_lengths(a_batch())


def test_check_mode_refuses_a_malformed_batch():
    with pytest.raises(ContractError, match="positions"):
        a_model(check=True).forward(a_batch(positions=torch.arange(5)))


def test_the_callers_configuration_is_not_written_to():
    model_class, config = family("gemma2")
    before = copy.deepcopy(config.__dict__)
    module = tiny_model(model_class, config)
    held = module.config
    implementation = held._attn_implementation
    HFModel(module, probe(model_class, config))
    assert module.config is not held
    assert held._attn_implementation == implementation
    assert config.hidden_size == before["hidden_size"]


def test_a_pass_leaves_no_trace_in_the_bridge_after_an_error():
    model = a_model()

    class Failing(OwnToken):
        def forward_extend(self, *args, **kwargs):
            raise ZeroDivisionError

    model.bind_attention(Failing())
    with pytest.raises(ZeroDivisionError):
        model.forward(a_batch())
    model.bind_attention(OwnToken())
    assert model.forward(a_batch()).next_token_logits.isfinite().all()
