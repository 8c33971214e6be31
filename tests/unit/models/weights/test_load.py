# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bedplate.errors import ConfigError, ModelNotFoundError, UnsupportedModelError, WeightsError
from bedplate.models.fusion.merge import merge_linears
from bedplate.models.weights import load_model

KINDS = ["llama", "qwen2", "tied", "mixtral", "qwen3_moe"]


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite(folder, change):
    """Pass the tensors of the only file through ``change``."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loaded_model_computes_what_was_saved(checkpoint, logits, kind):
    model, folder = checkpoint(kind)
    loaded = load_model(folder)
    assert torch.equal(logits(loaded.module), logits(model))
    assert not loaded.module.training
    assert not any(p.requires_grad for p in loaded.module.parameters())
    assert loaded.folder == folder
    assert loaded.config is loaded.module.config


@pytest.mark.parametrize("kind", KINDS)
def test_buffers_are_those_of_a_model_built_on_the_host(checkpoint, kind):
    model, folder = checkpoint(kind)
    want, got = dict(model.named_buffers()), dict(load_model(folder).module.named_buffers())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert any("inv_freq" in name for name in want)


def test_shards_are_read_in_order_with_progress(checkpoint, bits):
    model, folder = checkpoint("qwen3_moe", shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    seen = []
    loaded = load_model(folder, progress=lambda done, total: seen.append((done, total)))
    got = bits(loaded)
    assert all(torch.equal(got[name], tensor) for name, tensor in model.state_dict().items())
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(p.nbytes for p in model.parameters())


def test_the_environment_is_left_alone(checkpoint):
    _, folder = checkpoint()
    before = dict(os.environ)
    load_model(folder)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("declared", "asked", "want"),
    [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        (None, "auto", torch.float32),
        ("float32", "bfloat16", torch.bfloat16),
        ("float32", torch.float16, torch.float16),
    ],
)
def test_dtype(checkpoint, declared, asked, want):
    _, folder = checkpoint()
    edit_config(folder, dtype=declared)
    module = load_model(folder, dtype=asked).module
    assert {p.dtype for p in module.parameters()} == {want}
    assert module.model.rotary_emb.inv_freq.dtype == torch.float32


def test_weights_are_cast_as_transformers_casts_them(checkpoint, logits):
    _, folder = checkpoint()
    want = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(logits(load_model(folder, dtype="bfloat16").module), logits(want))


@pytest.mark.parametrize(
    ("attribute", "dtype", "wide"),
    [
        ("_keep_in_fp32_modules", torch.float16, True),
        ("_keep_in_fp32_modules", torch.bfloat16, False),
        ("_keep_in_fp32_modules_strict", torch.bfloat16, True),
        ("_keep_in_fp32_modules_strict", torch.float32, True),
    ],
)
def test_what_the_class_keeps_in_float32_stays_so(
    checkpoint, monkeypatch, attribute, dtype, wide
):
    from transformers import LlamaForCausalLM

    _, folder = checkpoint()
    monkeypatch.setattr(LlamaForCausalLM, attribute, ["input_layernorm"])
    module = load_model(folder, dtype=dtype).module
    kept = module.model.layers[0].input_layernorm.weight
    assert kept.dtype == (torch.float32 if wide else dtype)
    assert module.model.norm.weight.dtype == dtype


def test_a_buffer_that_the_class_keeps_in_float32_stays_so(checkpoint, monkeypatch):
    from transformers import LlamaForCausalLM

    class WithBuffer(LlamaForCausalLM):
        _keep_in_fp32_modules_strict = ("score_bias",)

        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("score_bias", torch.zeros(3))
            self.register_buffer("other", torch.zeros(3))

    _, folder = checkpoint()
    rewrite(folder, lambda t: t | {n: torch.ones(3) for n in ("score_bias", "other")})

    def from_config(config, dtype, **_options):
        return WithBuffer._from_config(config, dtype=dtype)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", from_config)
    module = load_model(folder, dtype="bfloat16").module
    assert module.score_bias.dtype == torch.float32
    assert module.other.dtype == torch.bfloat16
    assert module.score_bias.eq(1).all()
    assert module.other.eq(1).all()


def test_two_names_of_one_tensor_with_unlike_values_are_a_conflict(checkpoint):
    _, folder = checkpoint()
    rewrite(folder, lambda t: t | {"norm.weight": t["model.norm.weight"] + 1})
    with pytest.raises(WeightsError, match=r"norm\.weight and ") as error:
        load_model(folder)
    assert len(error.value.facts["conflicts"]) == 1


def test_tied_weights_are_one_storage_and_one_name(checkpoint):
    _, folder = checkpoint("tied")
    loaded = load_model(folder)
    module = loaded.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert "lm_head.weight" not in loaded.index.names()
    assert loaded.index.get("lm_head.weight").data_ptr() == module.lm_head.weight.data_ptr()


def test_a_tied_weight_may_be_stored_under_its_other_name(checkpoint, logits):
    model, folder = checkpoint("tied")
    rewrite(folder, lambda t: {"lm_head.weight": t.pop("model.embed_tokens.weight"), **t})
    assert torch.equal(logits(load_model(folder).module), logits(model))


def test_a_tied_weight_may_be_stored_twice(checkpoint, logits):
    model, folder = checkpoint("tied")
    rewrite(folder, lambda t: {"lm_head.weight": t["model.embed_tokens.weight"].clone(), **t})
    loaded = load_model(folder)
    assert torch.equal(logits(loaded.module), logits(model))
    assert loaded.index.aliases


def test_two_unlike_tensors_are_not_tied_whatever_the_config_says(checkpoint, caplog):
    _, folder = checkpoint("tied")
    rewrite(folder, lambda t: {"lm_head.weight": t["model.embed_tokens.weight"] + 1, **t})
    with caplog.at_level(logging.WARNING, "bedplate"):
        module = load_model(folder).module
    assert torch.equal(module.lm_head.weight, module.model.embed_tokens.weight + 1)
    assert "lm_head.weight" in caplog.text


def test_harmless_leftovers_are_ignored(checkpoint, logits):
    model, folder = checkpoint()
    rewrite(
        folder, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    )
    assert torch.equal(logits(load_model(folder).module), logits(model))


def test_every_problem_is_listed_at_once_with_its_file(checkpoint):
    _, folder = checkpoint()

    def damage(tensors):
        for layer in (0, 1):
            del tensors[f"model.layers.{layer}.mlp.up_proj.weight"]
        del tensors["lm_head.weight"]
        tensors["model.norm.weight"] = torch.ones(7)
        tensors["model.layers.0.input_layernorm.weight"] = torch.ones(32, dtype=torch.int64)
        return tensors | {"extra.0.a": torch.ones(1), "extra.1.a": torch.ones(1)}

    rewrite(folder, damage)
    with pytest.raises(WeightsError) as error:
        load_model(folder)
    facts = error.value.facts
    assert set(facts["missing"]) == {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
    }
    assert set(facts["unexpected"]) == {"extra.0.a", "extra.1.a"}
    assert facts["misshapen"] == (("model.norm.weight", (32,), (7,), "model.safetensors"),)
    assert [row[0] for row in facts["mistyped"]] == ["model.layers.0.input_layernorm.weight"]
    text = str(error.value)
    assert "Missing (3):\n  model.layers.{0-1}.mlp.up_proj.weight\n  lm_head.weight" in text
    assert "Unexpected (2):\n  extra.{0-1}.a (model.safetensors)" in text
    assert "model.norm.weight: wants (32,), got (7,) (model.safetensors)" in text
    assert "LlamaForCausalLM" in text


def test_a_stack_of_experts_with_one_missing_is_refused(checkpoint):
    _, folder = checkpoint("mixtral")
    rewrite(
        folder,
        lambda t: {
            n: x for n, x in t.items() if "layers.1" not in n or "experts.2.w1" not in n
        },
    )
    with pytest.raises(WeightsError) as error:
        load_model(folder)
    assert "layers.1" in str(error.value)
    assert "layers.0" not in str(error.value)


def test_quantized_checkpoints_are_refused_by_scheme(checkpoint):
    _, folder = checkpoint()
    edit_config(folder, quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="'awq'") as error:
        load_model(folder)
    assert error.value.facts["scheme"] == "awq"


def test_an_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UnsupportedModelError, match="no_such_model"):
        load_model(tmp_path, load_format="dummy")


def test_a_class_that_is_no_causal_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UnsupportedModelError, match=r"causal language model.*'vit'"):
        load_model(tmp_path, load_format="dummy")


@pytest.mark.parametrize(("option", "value"), [("load_format", "bin"), ("dtype", "int8")])
def test_unknown_settings_name_the_known_ones(checkpoint, option, value):
    _, folder = checkpoint()
    with pytest.raises(ConfigError, match=f"{value}.*(safetensors|bfloat16)"):
        load_model(folder, **{option: value})


def test_no_checkpoint(tmp_path):
    with pytest.raises(ModelNotFoundError):
        load_model(tmp_path)


def test_a_config_has_no_weights(config_of):
    with pytest.raises(ConfigError, match="dummy"):
        load_model(config_of())


def test_the_callers_config_is_not_touched(config_of):
    config = config_of()
    before = config.to_dict()
    load_model(config, load_format="dummy", dtype="bfloat16")
    assert config.to_dict() == before


def test_the_attention_interface_is_the_one_asked_for(checkpoint):
    _, folder = checkpoint()
    loaded = load_model(folder, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"


def test_generation_defaults_come_from_their_own_file(checkpoint):
    _, folder = checkpoint()
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    loaded = load_model(folder)
    assert loaded.generation_config.eos_token_id == [5, 6]
    assert loaded.module.generation_config is loaded.generation_config
    (folder / "generation_config.json").unlink()
    assert load_model(folder).generation_config.eos_token_id == loaded.config.eos_token_id


class TestDummy:
    def test_values_are_decided_by_name_and_seed(self, config_of, bits):
        first = bits(load_model(config_of(), load_format="dummy"))
        again = bits(load_model(config_of(num_hidden_layers=1), load_format="dummy"))
        other = bits(load_model(config_of(), load_format="dummy", seed=1))
        assert all(torch.equal(first[name], again[name]) for name in again)
        name = "model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(first[name], other[name])
        assert not torch.equal(first[name], first[name.replace("up", "gate")])

    def test_spread_is_that_of_an_initialised_model_and_norms_are_one(self, config_of):
        module = load_model(config_of(), load_format="dummy").module
        assert module.model.norm.weight.eq(1).all()
        assert abs(module.lm_head.weight.std().item() - 0.02) < 0.002
        assert abs(module.lm_head.weight.mean().item()) < 0.002

    def test_a_folder_with_only_a_config_is_enough(self, tmp_path, config_of):
        config_of("mixtral").save_pretrained(tmp_path)
        loaded = load_model(tmp_path, load_format="dummy", dtype="bfloat16")
        assert all(p.isfinite().all() for p in loaded.module.parameters())
        assert loaded.module.model.layers[0].mlp.experts.gate_up_proj.std() > 0

    def test_long_tensors_repeat_without_equal_rows(self, config_of, monkeypatch):
        from bedplate.models.weights import dummy

        monkeypatch.setattr(dummy, "BLOCK", 61)
        weight = load_model(config_of(), load_format="dummy").module.lm_head.weight
        assert torch.equal(weight.flatten()[:61], weight.flatten()[61:122])
        assert not torch.equal(weight[0], weight[1])


def test_weights_that_will_be_merged_are_put_side_by_side(checkpoint):
    _, folder = checkpoint("qwen2")
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    apart, together = load_model(folder), load_model(folder, together=[names])
    weights = [together.module.get_submodule(name).weight for name in names]
    storage = weights[0].untyped_storage()
    assert {weight.untyped_storage().data_ptr() for weight in weights} == {storage.data_ptr()}
    assert storage.nbytes() == sum(weight.nbytes for weight in weights)
    merged = merge_linears([together.module.get_submodule(name) for name in names])
    assert merged.weight.data_ptr() == storage.data_ptr()
    for name, value in apart.module.state_dict().items():
        assert torch.equal(together.index.get(name), value), name


@pytest.mark.parametrize(
    "names",
    [["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"],
     ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"]],
    ids=["unlike", "one twice"],
)  # fmt: skip
def test_weights_that_cannot_be_put_side_by_side_stay_apart(checkpoint, names):
    _, folder = checkpoint("llama")
    loaded = load_model(folder, together=[names])
    for name in names:
        weight = loaded.module.get_submodule(name).weight
        assert weight.untyped_storage().nbytes() == weight.nbytes
