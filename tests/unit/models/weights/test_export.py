# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from bedplate.errors import ConfigError
from bedplate.models.weights import WeightIndex, load_model, save_pretrained, save_sharded_model


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[n], second[n]) for n in first
    )


def test_shards_hold_every_tensor_once_under_the_module_name(checkpoint, tmp_path):
    model, folder = checkpoint("tied")
    index = load_model(folder).index
    files = save_sharded_model(index, tmp_path / "out", rank=3)
    assert [file.name for file in files] == ["model-rank-3-part-0.safetensors"]
    saved = load_file(files[0])
    assert same(saved, {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"})


@given(max_size=st.integers(1, 400))
@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
def test_a_part_never_exceeds_the_size_unless_one_tensor_does(tmp_path_factory, max_size):
    module = nn.Sequential(*(nn.Linear(n, 3) for n in (1, 9, 4, 2))).requires_grad_(False)
    files = save_sharded_model(
        WeightIndex(module), tmp_path_factory.mktemp("s"), None, max_size
    )
    parts = [load_file(file) for file in files]
    sizes = [[t.nbytes for t in part.values()] for part in parts]
    assert all(sum(part) <= max_size or len(part) == 1 for part in sizes)
    merged = {name: tensor for part in parts for name, tensor in part.items()}
    assert same(merged, dict(module.state_dict()))
    assert sum(len(part) for part in parts) == len(merged)


def test_the_pattern_names_rank_and_part(checkpoint, tmp_path):
    _, folder = checkpoint()
    files = save_sharded_model(
        load_model(folder).index, tmp_path / "o", "r{rank}p{part}.safetensors", 9000, rank=1
    )
    assert [file.name for file in files] == [f"r1p{n}.safetensors" for n in range(len(files))]
    assert len(files) > 1


@pytest.mark.parametrize(("pattern", "size"), [("x.safetensors", None), (None, 0)])
def test_what_cannot_be_written_is_refused(checkpoint, tmp_path, pattern, size):
    _, folder = checkpoint()
    with pytest.raises(ConfigError, match="part"):
        save_sharded_model(load_model(folder).index, tmp_path / "o", pattern, size)


def test_shards_beside_a_config_load_again(checkpoint, tmp_path, bits):
    _, folder = checkpoint("mixtral")
    loaded = load_model(folder)
    save_sharded_model(loaded.index, tmp_path / "o", max_size=20_000)
    loaded.config.save_pretrained(tmp_path / "o")
    assert same(bits(load_model(tmp_path / "o")), bits(loaded))


@pytest.mark.parametrize("kind", ["llama", "tied", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("shard", ["50GB", 20_000])
def test_a_saved_checkpoint_is_the_one_that_was_loaded(checkpoint, tmp_path, bits, kind, shard):
    _, folder = checkpoint(kind)
    loaded = load_model(folder)
    save_pretrained(loaded.index, tmp_path / "o", max_shard_size=shard)
    merged = {}
    for file in (tmp_path / "o").glob("*.safetensors"):
        merged |= load_file(file)
    assert same(merged, load_file(folder / "model.safetensors"))
    assert same(bits(load_model(tmp_path / "o")), bits(loaded))
    assert same(bits(AutoModelForCausalLM.from_pretrained(tmp_path / "o")), bits(loaded))
