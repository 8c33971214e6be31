# SPDX-License-Identifier: Apache-2.0
"""ModelRunner alone, as engines of other people use it."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

from bedplate import ForwardBatch, ForwardMode, ModelRunner, SamplingParams, demo
from bedplate.batch.schedule_batch import ScheduleBatch
from bedplate.config import EngineConfig
from bedplate.contract import Candidate, Decision
from bedplate.errors import BedplateError, ContractError, DeviceMemoryError
from bedplate.reference.attention import ReferenceAttention, reference_provider, store
from bedplate.reference.ops import OPERATIONS
from bedplate.registry import DecisionLog
from bedplate.registry.door import open_backend
from bedplate.runner.dummy import dummy_prompt
from bedplate.runner.executor import ModelExecutor
from bedplate.testing.graphs import TapeGraphRunner


class StaticAttention(ReferenceAttention):
    """Decode with the whole table row and a mask: shapes that a graph can hold."""

    extend_recordable = True

    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        """Each token as a request that ends with it."""
        tokens = torch.arange(batch.num_tokens)[:, None]
        start, count = batch.extend.start_loc, batch.extend.seq_lens
        ours = (tokens >= start) & (tokens < start + count)
        rows = (ours * batch.req_pool_indices).sum(1)
        each = replace(batch, req_pool_indices=rows, seq_lens=batch.positions + 1)
        return self.forward_decode(q, k, v, call, each, sinks=sinks)

    def forward_decode(self, q, k, v, call, batch, *, sinks=None):
        store(self._pool, k, v, call, batch)
        slots = self._req_to_token[batch.req_pool_indices.long()].long()
        keys = self._pool.key(call.call_id)[slots].transpose(1, 2)
        values = self._pool.value(call.call_id)[slots].transpose(1, 2)
        mask = torch.arange(slots.shape[1]) < batch.seq_lens[:, None]
        packed = q.reshape(len(q), call.num_kv_heads, -1, call.head_dim)
        out = torch.nn.functional.scaled_dot_product_attention(
            packed, keys, values, attn_mask=mask[:, None, None], scale=call.scale
        )
        return out.reshape(len(q), call.num_heads, call.value_dim)


STATIC = replace(reference_provider, name="static", build=StaticAttention)


def make(copied=False, tape=False, **settings):
    config = EngineConfig(
        model=str(demo.path()), backend="cpu", dtype="float32", max_context_len=64,
        max_running_requests=4, **settings,
    )  # fmt: skip
    log = DecisionLog()
    bound = open_backend(config=config, reference_ops=OPERATIONS, decisions=log)
    bound.attention_providers.register(reference_provider)
    bound.attention_providers.register(STATIC)
    if copied:
        memory = replace(bound.capabilities.memory, unified=False)
        bound = replace(bound, capabilities=replace(bound.capabilities, memory=memory))
    if tape:
        bound = replace(bound, make_graph_runner=TapeGraphRunner)
    return ModelRunner(config, bound, log)


@pytest.fixture(autouse=True)
def no_collections(monkeypatch):
    """Full collections around captures would be most of the time of those that capture."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.fixture(scope="module")
def runner():
    made = make()
    made.initialize()
    yield made
    made.bound.shutdown()


def decode_batch(size, *, mode=ForwardMode.DECODE, tokens=None):
    ids = torch.full((size,), 40) if tokens is None else tokens
    return ForwardBatch(
        mode=mode, batch_size=size, input_ids=ids,
        positions=torch.zeros(size, dtype=torch.int64),
        req_pool_indices=torch.arange(1, size + 1, dtype=torch.int32),
        seq_lens=torch.ones(size, dtype=torch.int32),
        seq_lens_cpu=torch.ones(size, dtype=torch.int32),
        out_cache_loc=torch.arange(1, size + 1, dtype=torch.int32),
    )  # fmt: skip


def test_stages_have_names_durations_and_an_order(runner):
    names = [name for name, _ in runner.stages()]
    assert names == list(runner.stage_seconds)
    assert names.index("load_model") < names.index("init_memory_pool")
    assert names.index("measure_graphs") < names.index("init_memory_pool")
    assert names.index("init_attention_backend") < names.index("init_device_graphs")
    assert not runner.decisions.unexplained()


def test_a_batch_made_by_hand_goes_through(runner):
    runner.req_to_token_pool.table[1:4, 0] = [1, 2, 3]
    with runner.bound.runtime.inference_guard():
        output, used_graph = runner.forward(decode_batch(3))
        direct = runner.forward_decode(decode_batch(3))
    assert output.next_token_logits.shape == (3, runner.spec.vocab_size)
    assert not used_graph
    torch.testing.assert_close(output.next_token_logits, direct.next_token_logits)
    assert (
        runner.sample(output, decode_batch(3)).tolist()
        == [output.next_token_logits[0].argmax().item()] * 3
    )


def test_an_idle_pass_has_no_rows(runner):
    output, _ = runner.forward(decode_batch(0, mode=ForwardMode.IDLE))
    assert output.next_token_logits.shape == (0, runner.spec.vocab_size)


@pytest.mark.parametrize("mode", [ForwardMode.DUMMY_FIRST, ForwardMode.SPLIT_PREFILL])
def test_modes_that_are_no_pass_of_the_model_are_refused(runner, mode):
    with pytest.raises(ContractError, match=mode.name):
        runner.forward(decode_batch(1, mode=mode))


def test_weights_change_in_place_and_back(runner):
    name = "model.norm.weight"
    before = runner.loaded.index.get(name).clone()
    address = runner.loaded.index.get(name).data_ptr()
    assert runner.update_weights_from_tensor([(name, before * 2)])
    torch.testing.assert_close(runner.loaded.index.get(name), before * 2)
    assert runner.update_weights_from_disk(demo.path())
    torch.testing.assert_close(runner.loaded.index.get(name), before)
    assert runner.loaded.index.get(name).data_ptr() == address
    assert not runner.update_weights_from_tensor([("no.such.weight", before)])
    assert runner.get_weights_by_name(name, 3) == pytest.approx(before[:3].tolist())


def test_logits_that_are_no_numbers_fail_their_request_alone(runner):
    executor = ModelExecutor(runner, ())
    runner.req_to_token_pool.table[1:3, 0] = [1, 2]
    head = runner.loaded.index.get("model.embed_tokens.weight")
    kept = head[41].clone()
    head[41] = float("nan")  # also the logit of token 41: forbid it by looking at row 40 only
    try:
        for row in (1, 2):
            executor.set_request(row, SamplingParams(), 1)
        zeros = np.zeros(2, np.int64)
        batch = ScheduleBatch(
            mode=ForwardMode.DECODE, req_pool_indices=np.array([1, 2], np.int32),
            seq_lens=np.ones(2, np.int32), input_ids=np.array([40, 41]), positions=zeros,
            out_cache_loc=np.array([1, 2], np.int32),
        )  # fmt: skip
        output = executor.launch(batch).wait()
        assert set(output.errors) == {0, 1}, "the tied head makes a NaN column for both"
        assert (output.next_token_ids == -1).all()
        assert "not numbers" in output.errors[1]
    finally:
        head[41] = kept
    assert executor.launch(batch).wait().errors is None


def test_a_stage_that_fails_is_explained_by_the_backend():
    made = make()
    made.bound = replace(made.bound, explain_error=lambda error: f"plainly: {error}")

    def fail():
        raise RuntimeError("vendor code 17")

    made.stages = lambda: (("load_model", fail),)
    with pytest.raises(BedplateError, match="plainly: vendor code 17"):
        made.initialize()
    made.bound.shutdown()


def test_what_is_chosen_below_the_core_is_on_record_once_start_up_is_over(monkeypatch):
    made = make()
    small = Candidate(name="small", verdict="chosen", reason="the large did not fit")
    choice = Decision(point="sizes.op", chosen="small", candidates=(small,))
    found = []
    runtime = made.bound.runtime
    monkeypatch.setattr(runtime, "ready", lambda: found.append(choice))
    monkeypatch.setattr(runtime, "decisions", lambda: found)
    made.initialize()
    assert [d for d in made.decisions if d.point == "sizes.op"] == [choice]
    assert not made.decisions.unexplained()
    made.bound.shutdown()


def test_a_cache_that_cannot_be_allocated_says_what_to_set():
    made = make()

    def refuse(_request):
        raise RuntimeError("out of memory")

    made.bound = replace(made.bound, make_kv_pool=refuse)
    with pytest.raises(DeviceMemoryError, match="--max-total-tokens"):
        made.initialize()
    made.bound.shutdown()


def test_graphs_are_measured_before_the_cache_is_sized_and_serve_padded_batches():
    made = make(copied=True, tape=True, graphs=True, capture_sizes=(1, 4), attention="static")
    sizes = []
    pools = made._make_pools
    made._make_pools = lambda tokens: (sizes.append(tokens), pools(tokens))[1]
    made.initialize()
    assert len(sizes) == 2, "a trial on a small cache, then the real one"
    assert sizes[0] < sizes[1]
    assert [key.batch_size for key in made.graph_runner.captured] == [4, 1]
    table = made.req_to_token_pool.req_to_token
    table[1:4, 0] = torch.tensor([1, 2, 3], dtype=torch.int32)
    with made.bound.runtime.inference_guard():
        batch = decode_batch(3, tokens=torch.tensor([40, 50, 60]))
        output, bucket, reason = made.run(batch)
        assert (bucket, reason) == (4, "")
        torch.testing.assert_close(
            output.next_token_logits, made.forward_decode(batch).next_token_logits
        )
        _, bucket, reason = made.run(decode_batch(0, mode=ForwardMode.IDLE))
        assert bucket is None
        assert reason
    made.bound.shutdown()


def decision_of(made):
    (decision,) = [d for d in made.decisions if d.point == "prompt_graphs"]
    return decision


def test_an_eager_pass_has_the_rows_that_attention_asks_for(monkeypatch):
    made = make(copied=True, attention="static")
    made.initialize()
    made.req_to_token_pool.req_to_token[1, :40] = torch.arange(1, 41, dtype=torch.int32)
    prompt = replace(
        dummy_prompt(40, torch.device("cpu")),
        input_ids=torch.arange(40),
        req_pool_indices=torch.ones(1, dtype=torch.int32),
        out_cache_loc=torch.arange(1, 41, dtype=torch.int32),
    )
    seen = []
    monkeypatch.setattr(made.attention, "padded_tokens", lambda batch: batch.num_tokens + 7)
    monkeypatch.setattr(made.attention, "prepare", lambda batch: seen.append(batch.num_tokens))
    with made.bound.runtime.inference_guard():
        padded = made.forward_extend(prompt).next_token_logits
        every = made.forward_extend(replace(prompt, logits_rows=None)).next_token_logits
        assert seen == [47, 40]  # where all logits are wanted, rows are counted
        assert len(every) == 40
        monkeypatch.undo()
        plain = made.forward_extend(prompt).next_token_logits
    torch.testing.assert_close(padded, plain)


def test_prompts_are_recorded_where_attention_can_be():
    made = make(
        copied=True, tape=True, graphs=True, capture_sizes=(1,), attention="static",
        chunked_prefill_tokens=48,
    )  # fmt: skip
    made.initialize()
    assert made.prompt_graphs.captured == (32, 48)
    made.req_to_token_pool.req_to_token[1, :40] = torch.arange(1, 41, dtype=torch.int32)
    prompt = dummy_prompt(40, torch.device("cpu"))
    prompt = replace(
        prompt,
        input_ids=torch.arange(40),
        req_pool_indices=torch.ones(1, dtype=torch.int32),
        out_cache_loc=torch.arange(1, 41, dtype=torch.int32),
    )
    with made.bound.runtime.inference_guard():
        output, bucket, reason = made.run(prompt)
        assert (bucket, reason) == (48, "")
        expected = made.forward_extend(prompt)
        torch.testing.assert_close(output.next_token_logits, expected.next_token_logits)
        assert made.run(replace(prompt, logits_rows=None))[1:] == (None, "logits-rows")
    decision = decision_of(made)
    assert (decision.chosen, decision.detail["tokens"]) == ("on", "32, 48")
    assert "up to 48 tokens" in decision.candidates[0].reason
    assert made.idle() is False
    made.bound.shutdown()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"attention": "static", "capture_tokens": ()}, "no size is asked for"),
        ({"attention": "reference"}, "ReferenceAttention bakes the lengths"),
    ],
)
def test_prompts_that_are_not_recorded_say_why(settings, reason):
    made = make(copied=True, tape=True, graphs=True, capture_sizes=(1,), **settings)
    made.initialize()
    assert made.prompt_graphs is None
    assert reason in decision_of(made).candidates[0].reason
    made.bound.shutdown()


def test_without_graphs_the_trial_is_left_out():
    made = make(copied=True)
    sizes = []
    pools = made._make_pools
    made._make_pools = lambda tokens: (sizes.append(tokens), pools(tokens))[1]
    made.initialize()
    assert len(sizes) == 1
    made.bound.shutdown()
