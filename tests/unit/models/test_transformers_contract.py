# SPDX-License-Identifier: Apache-2.0
"""What we rely on in transformers, a test per promise; run on the lowest and newest release."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from bedplate.models import transformers_api as hf
from bedplate.testing.tiny_models import family, tiny_model

# Upstream quirk (transformers 5.17): some modeling files use torch.jit.script when imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def llama(**overrides):
    model_class, config = family("llama")
    for name, value in overrides.items():
        setattr(config, name, value)
    return tiny_model(model_class, config)


IDS = torch.tensor([[3, 4, 5, 6]])


def test_release_is_supported():
    assert Version(transformers.__version__) >= Version("5.17.0")


def test_registered_attention_is_what_a_model_calls():
    seen = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        seen.append((query.shape, key.shape, value.shape, attention_mask, kwargs))
        return query.transpose(1, 2), None

    model = llama()
    with hf.registered_attention("contract_test", attend):
        hf.set_attention(model, "contract_test")
        model(input_ids=IDS, position_ids=torch.arange(4)[None], use_cache=False)
    assert len(seen) == 4
    query, key, value, mask, arguments = seen[0]
    assert (query, key, value) == ((1, 4, 4, 16), (1, 2, 4, 16), (1, 2, 4, 16))
    assert mask is None, "a name without a mask function must get no mask"
    assert arguments["scaling"] == 0.25


def test_registration_ends_with_its_block():
    with hf.registered_attention("contract_test", lambda: None):
        pass
    model = llama()
    hf.set_attention(model, "contract_test")
    with pytest.raises(KeyError):
        model(input_ids=IDS)


def test_a_registered_mask_function_gets_the_closure():
    seen = []

    def mask(*args, mask_function, **kwargs):
        seen.append(mask_function)

    def attend(module, query, key, value, attention_mask, **kwargs):
        return query.transpose(1, 2), None

    model = llama()
    with hf.registered_attention("m", attend), hf.registered_mask("m", mask):
        hf.set_attention(model, "m")
        model(input_ids=IDS, position_ids=torch.arange(4)[None], use_cache=False)
    zero, one = torch.tensor(0), torch.tensor(1)
    assert bool(seen[0](zero, zero, one, zero))
    assert not bool(seen[0](zero, zero, zero, one))


def test_an_unregistered_name_is_an_error():
    model = llama()
    hf.set_attention(model, "never_registered")
    with pytest.raises(KeyError):
        model(input_ids=IDS)


def test_our_name_has_no_mask_function():
    assert hf.ATTENTION_NAME not in transformers.AttentionMaskInterface._global_mapping


def test_a_name_set_on_a_config_reaches_its_parts():
    config = transformers.Llama4Config()
    config._attn_implementation = "somewhere"
    assert config.text_config._attn_implementation == "somewhere"


def test_attention_modules_read_their_config_at_every_call():
    model = llama()
    hf.set_attention(model, "eager")
    first = model(input_ids=IDS).logits
    hf.set_attention(model, "sdpa")
    torch.testing.assert_close(model(input_ids=IDS).logits, first)


def test_experts_implementation_can_be_set():
    model_class, config = family("qwen3_moe")
    model = tiny_model(model_class, config)
    expected = model(input_ids=IDS).logits
    hf.set_experts(model, "eager")
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)


def test_isolated_configs_keep_sharing_and_leave_the_original():
    model = llama()
    original = model.config
    hf.isolate_configs(model)
    assert model.config is not original
    assert len(hf.configs_of(model)) == 1
    hf.set_attention(model, "elsewhere")
    assert original._attn_implementation != "elsewhere"


def test_logits_to_keep_takes_row_numbers():
    model = llama()
    everything = model(input_ids=IDS).logits[0]
    rows = torch.tensor([3, 1])
    kept = model(input_ids=IDS, logits_to_keep=rows).logits[0]
    torch.testing.assert_close(kept, everything[rows])
    assert hf.takes_argument(model, "logits_to_keep")


def test_keywords_passed_on_are_found():
    model = llama()
    assert hf.takes_argument(model, "position_ids", passed_on=True)
    assert not hf.takes_argument(model, "no_such_argument", passed_on=True)


def test_the_head_receives_the_hidden_states():
    model = llama()
    caught = []
    head = hf.output_embeddings(model)
    head.register_forward_pre_hook(lambda _m, args: caught.append(args[0]))
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(head.weight @ caught[0][0].T, logits[0].T)


def test_text_config_of_a_composite():
    config = transformers.Llama4Config()
    assert hf.text_config(config) is config.text_config
    assert hf.text_config(transformers.LlamaConfig()).model_type == "llama"


def test_causal_classes_are_mapped_once_each():
    pairs = hf.causal_lm_classes()
    names = [model.__name__ for _, model in pairs]
    assert len(names) == len(set(names)) >= 170
    assert all(issubclass(model, transformers.PreTrainedModel) for _, model in pairs)
    assert (transformers.LlamaConfig, transformers.LlamaForCausalLM) in pairs


def test_config_class_of_a_model_type():
    assert hf.causal_lm_config_class("qwen3") is transformers.Qwen3Config


def test_expand_kv_is_one_method_of_latent_attention():
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    parameters = list(inspect.signature(DeepseekV3Attention.expand_kv).parameters)
    assert len(parameters) == 3, "self, latent, rotated key"
    assert not inspect.signature(DeepseekV3Attention.expand_kv).parameters.keys() & {"kwargs"}


def test_the_look_at_the_batch_can_be_left_out_of_a_rope():
    parameters = {
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0,
    }  # fmt: skip
    model = llama(rope_parameters=parameters, max_position_embeddings=8)
    rotary = model.model.rotary_emb
    forward = hf.constant_rope(rotary)
    short, long = torch.arange(4)[None], torch.tensor([[0, 1, 2, 3, 300]])
    states = torch.zeros(1, 4, 64)
    alone = forward(states, short)[0]
    packed = forward(states, long)[0]
    torch.testing.assert_close(alone, packed[:, :4])
    looked = type(rotary).forward(rotary, states, long)[0]
    assert not torch.allclose(alone, looked[:, :4]), "the quirk is gone; drop constant_rope"


def test_a_plain_module_has_no_look_to_leave_out():
    assert hf.constant_rope(nn.Linear(2, 2)) is None
