# SPDX-License-Identifier: Apache-2.0
"""What the probe sees, what it refuses, and that it leaves everything as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig

from bedplate.errors import UnsupportedModelError
from bedplate.models.probe import probe
from bedplate.testing import tiny_models

# Upstream quirk (transformers 5.17): some modeling files use torch.jit.script when imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


def tiny(model_type, **overrides):
    model_class, _ = tiny_models.family(model_type)
    fields = dict(tiny_models.FAMILIES[model_type]) | overrides
    return model_class, tiny_models.tiny_config(model_class.config_class, fields)


def calls_of(model_type, **overrides):
    return probe(*tiny(model_type, **overrides)).calls


# What is seen.


def test_a_plain_model():
    spec = probe(*tiny("llama"))
    assert spec.architecture == "LlamaForCausalLM"
    assert (spec.model_type, spec.hidden_size, spec.vocab_size) == ("llama", 64, 160)
    assert (spec.num_layers, spec.max_position_embeddings, spec.eos_token_ids) == (4, 512, (2,))
    assert [call.module for call in spec.calls] == [
        f"model.layers.{i}.self_attn" for i in range(4)
    ]
    assert [call.call_id for call in spec.calls] == [0, 1, 2, 3]
    call = spec.calls[0]
    assert (call.num_heads, call.num_kv_heads, call.head_dim, call.value_dim) == (4, 2, 16, 16)
    assert call.scale == pytest.approx(16**-0.5)
    assert (call.causal, call.window, call.chunk, call.softcap, call.sinks) == (
        True, None, None, None, False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "attribute", "expected"),
    [
        ("gemma2", "window", [8, None, 8, None]),  # mask and keyword
        ("phimoe", "window", [8, 8, 8, 8]),  # mask only
        ("llama4_text", "chunk", [8, 8, 8, None]),  # mask only
        ("gemma2", "softcap", [50.0] * 4),
        ("gemma2", "scale", [24**-0.5] * 4),
        ("granite", "scale", [0.2] * 4),
        ("opt", "scale", [1.0] * 4),  # scales the queries itself
        ("gpt_oss", "sinks", [True] * 4),
        ("gemma4_text", "head_dim", [16, 32, 16, 32]),  # two sizes in one model
        ("gemma4_text", "alias_of", [None, None, 0, 1]),  # later layers read earlier caches
    ],
)
def test_facts_of_calls(model_type, attribute, expected):
    seen = [getattr(call, attribute) for call in calls_of(model_type)]
    assert seen == pytest.approx(expected) if attribute == "scale" else seen == expected


def test_latent_attention_is_one_narrow_head():
    for call in calls_of("deepseek_v3"):
        assert (call.num_heads, call.num_kv_heads) == (4, 1)
        assert (call.head_dim, call.value_dim, call.value_in_key) == (32 + 8, 32, True)
        assert call.scale == pytest.approx(24**-0.5)


def test_a_module_that_attends_twice_has_two_ordinals():
    config = tiny_models.tiny_config(transformers.DiffLlamaConfig)
    calls = probe(transformers.DiffLlamaForCausalLM, config).calls
    assert [(c.module.split(".")[2], c.ordinal) for c in calls[:4]] == [
        ("0", 0), ("0", 1), ("1", 0), ("1", 1),
    ]  # fmt: skip


def test_full_size_takes_neither_memory_nor_time():
    """A 671-billion-parameter model, described without its weights."""
    calls = probe(transformers.DeepseekV3ForCausalLM, transformers.DeepseekV3Config()).calls
    assert len(calls) == 61
    assert {(c.num_heads, c.head_dim, c.value_dim) for c in calls} == {(128, 576, 512)}


def test_an_offset_of_learned_positions_is_found():
    config = tiny_models.tiny_config(transformers.RobertaConfig, {"pad_token_id": 1})
    spec = probe(transformers.RobertaForCausalLM, config)
    assert spec.position_offset == 2
    assert spec.max_position_embeddings == 512 - 2, "two rows of the table are no positions"


def test_a_decoder_that_counts_itself_has_a_seam():
    config = tiny_models.tiny_config(transformers.BartConfig)
    spec = probe(transformers.BartForCausalLM, config)
    assert spec.position_modules == ("model.decoder.embed_positions",)
    assert spec.position_offset == 0
    assert probe(*tiny("llama")).position_modules == ()


def test_a_scale_by_an_own_count_of_tokens_needs_the_past_length():
    """Llama-4 scales queries by a count of its own, beside the positions it is given."""
    assert probe(*tiny("llama4_text")).past_length_seam
    assert not probe(*tiny("ministral3")).past_length_seam  # by the given positions


def test_rope_that_looks_at_the_batch_limits_the_length():
    factors = [1.0] * 8
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": factors,
        "long_factor": [4.0] * 8, "original_max_position_embeddings": 64,
    }  # fmt: skip
    spec = probe(*tiny("phi3", rope_parameters=rope, original_max_position_embeddings=64))
    assert spec.max_position_embeddings == 64
    assert "longrope" in spec.limits[0]


def test_tied_embeddings_are_seen():
    assert probe(*tiny("llama", tie_word_embeddings=True)).tied_embeddings
    assert not probe(*tiny("llama", tie_word_embeddings=False)).tied_embeddings


def test_evidence_says_what_could_not_be_asked():
    indexing = llama_with(after_layers=lambda x: x[:, torch.arange(x.shape[1])])
    assert "used as index" in probe(indexing, tiny("llama")[1]).evidence[0]
    assert probe(*tiny("llama")).evidence == ()


# What is left behind.


def test_configuration_and_registries_are_untouched():
    model_class, config = tiny("gemma2")
    before = copy.deepcopy(config.__dict__)
    registries = [dict(i._global_mapping) for i in (AttentionInterface, AttentionMaskInterface)]
    register = nn.Module.register_parameter
    probe(model_class, config)
    assert config.__dict__ == before
    assert registries == [
        dict(i._global_mapping) for i in (AttentionInterface, AttentionMaskInterface)
    ]
    assert nn.Module.register_parameter is register
    assert torch.get_default_dtype() is torch.float32


def test_registries_are_restored_when_a_model_breaks():
    class Broken(llama.LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, **kwargs):
            raise RuntimeError("no")

    before = dict(AttentionInterface._global_mapping)
    with pytest.raises(UnsupportedModelError, match="RuntimeError: no"):
        probe(Broken, tiny("llama")[1])
    assert dict(AttentionInterface._global_mapping) == before


# What is refused.


def llama_with(attention_kwargs=None, *, after_layers=None):
    """A Llama whose attention passes more keywords, or whose states mix afterwards."""

    class Variant(llama.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                if after_layers is not None:
                    layer.mlp.register_forward_hook(lambda _m, _a, out: after_layers(out))

        def forward(self, input_ids=None, position_ids=None, **kwargs):
            return super().forward(
                input_ids=input_ids, position_ids=position_ids,
                **kwargs, **(attention_kwargs or {}),
            )  # fmt: skip

    return Variant


def _grow(states):
    return states * (1 + torch.arange(states.shape[1])[:, None] / 1000)


REFUSALS = {
    "unknown keyword": (llama_with({"block_indices": torch.zeros(1)}), "block_indices"),
    "two unknown keywords": (
        llama_with({"indices": 1, "position_bias": torch.zeros(1)}), "indices, position_bias"
    ),
    "running sum": (llama_with(after_layers=lambda x: x.cumsum(1)), "outside attention"),
    "shift by one": (llama_with(after_layers=lambda x: x.roll(1, 1)), "outside attention"),
    "looks ahead": (llama_with(after_layers=lambda x: x.flip(1)), "outside attention"),
    "batch mean": (llama_with(after_layers=lambda x: x - x.mean(1, True)), "outside attention"),
    "counts its tokens": (llama_with(after_layers=_grow), "beside those given"),
    "bidirectional": (llama_with({"is_causal": False}), "bidirectional"),
}  # fmt: skip


@pytest.mark.parametrize(("variant", "word"), REFUSALS.values(), ids=REFUSALS.keys())
def test_variants_of_llama_are_refused(variant, word):
    with pytest.raises(UnsupportedModelError, match=word) as refusal:
        probe(variant, tiny("llama")[1])
    assert "docs/reference/models.md" in str(refusal.value)


@pytest.mark.parametrize(
    ("model", "overrides", "word"),
    [
        ("Mamba", {}, "position_ids"),
        ("Lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
         "outside attention"),
        ("Qwen3Next", {}, "outside attention"),  # linear attention beside the real one
        ("Bloom", {}, "position_ids"),
        ("DeepseekV32", {}, "works with its mask itself"),  # its indexer adds scores to it
        ("GPTJ", {"rotary_dim": 8}, "never calls the attention interface"),
        ("DeepseekV4", {}, "outside attention"),  # compressed keys
    ],
)  # fmt: skip
def test_families_without_a_correct_execution_are_refused(model, overrides, word):
    model_class = getattr(transformers, f"{model}ForCausalLM")
    config = tiny_models.tiny_config(getattr(transformers, f"{model}Config"), overrides)
    with pytest.raises(UnsupportedModelError, match=word):
        probe(model_class, config)


def test_an_encoder_is_refused():
    config = tiny_models.tiny_config(transformers.T5Config)
    with pytest.raises(UnsupportedModelError, match="encoder"):
        probe(transformers.T5ForConditionalGeneration, config)


def test_a_model_that_ignores_positions_is_refused():
    class Deaf(llama.LlamaForCausalLM):
        def forward(self, input_ids=None, position_ids=None, **kwargs):
            return super().forward(input_ids=input_ids, **kwargs)

    with pytest.raises(UnsupportedModelError, match="ignores those given"):
        probe(Deaf, tiny("llama")[1])


def test_a_mask_that_the_model_changes_is_refused():
    class Biased(llama.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.model.layers:
                layer.self_attn.register_forward_pre_hook(_bias_mask, with_kwargs=True)

    def _bias_mask(_module, args, kwargs):
        mask = kwargs["attention_mask"]
        return args, kwargs | {"attention_mask": None if mask is None else mask + 0.5}

    with pytest.raises(UnsupportedModelError, match="computes its own"):
        probe(Biased, tiny("llama")[1])


def test_default_configuration_of_llama_is_served():
    assert len(probe(llama.LlamaForCausalLM, LlamaConfig()).calls) == 32


def test_linears_that_read_the_same_are_siblings():
    first = probe(*tiny("llama")).siblings[:2]
    layer = "model.layers.0"
    assert first == (
        tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv"),
        (f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"),
    )
    assert probe(*tiny("phi3")).siblings == (), "it has them merged"
