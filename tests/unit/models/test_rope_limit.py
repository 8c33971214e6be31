# SPDX-License-Identifier: Apache-2.0
"""No request changes another one's angles, and lengths that would need it are refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from tests.integration.parity.rig import Rig, oracle_logits

from bedplate.errors import RequestTooLongError
from bedplate.models.probe import probe
from bedplate.models.rope_limit import freeze_ropes, rope_limit
from bedplate.testing.tiny_models import tiny_config, tiny_model

SWITCH = 24
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8, "original_max_position_embeddings": SWITCH,
}  # fmt: skip


def a_phi3():
    config = tiny_config(
        transformers.Phi3Config,
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": SWITCH},
    )
    return transformers.Phi3ForCausalLM, config


@pytest.mark.parametrize(
    ("parameters", "limit"),
    [
        (LONG_ROPE, SWITCH),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 512),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, None),
        ({"rope_type": "default", "rope_theta": 1e4}, None),
    ],
    ids=["longrope", "dynamic", "linear", "default"],
)
def test_limit_by_kind(parameters, limit):
    config = tiny_config(transformers.LlamaConfig, {"rope_parameters": parameters})
    assert rope_limit(config)[0] == limit
    assert len(rope_limit(config)[1]) == (limit is not None)


def test_no_rope_at_all_has_no_limit():
    assert rope_limit(transformers.GPT2Config()) == (None, ())


def test_transformers_mixes_requests_and_we_do_not():
    """The quirk itself: a long companion moves a short request's angles."""
    model = tiny_model(*a_phi3())
    short = torch.arange(4)[None]
    packed = torch.tensor([[0, 1, 2, 3, SWITCH + 5]])
    states = torch.zeros(1, 1, 64)
    rotary = model.model.rotary_emb
    alone = rotary(states, short)[0]
    assert not torch.allclose(rotary(states, packed)[0][:, :4], alone)
    freeze_ropes(model)
    rotary.inv_freq.copy_(rotary.original_inv_freq)
    torch.testing.assert_close(rotary(states, packed)[0][:, :4], alone)


def test_up_to_the_switch_it_is_right_and_one_token_further_it_is_refused():
    model_class, config = a_phi3()
    spec = probe(model_class, config)
    rig = Rig(tiny_model(model_class, config), spec)
    full = rig.start([3 + i for i in range(SWITCH)])
    short = rig.start([7, 8, 9])
    rig.extend((full, SWITCH), (short, 3))
    assert rig.check(full, short) <= 1e-4
    assert oracle_logits(rig.oracle, full.tokens).isfinite().all()
    full.tokens.append(5)
    with pytest.raises(RequestTooLongError, match=f"{SWITCH + 1} tokens long.*longrope"):
        rig.extend((full, 1))
