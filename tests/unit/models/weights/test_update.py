# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from bedplate.errors import ConfigError, WeightsError
from bedplate.models.weight_bucket import flatten
from bedplate.models.weights import (
    get_weights_by_name,
    load_model,
    update_weights_from_disk,
    update_weights_from_tensor,
)


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[n], second[n]) for n in first
    )


def addresses(loaded):
    return {name: loaded.index.get(name).data_ptr() for name in loaded.index.names()}


@pytest.mark.parametrize("kind", ["llama", "tied", "mixtral", "qwen3_moe"])
class TestInPlace:
    def test_from_disk(self, checkpoint, bits, logits, kind):
        _, folder = checkpoint(kind)
        other, other_folder = checkpoint(kind, seed=1)
        loaded = load_model(folder)
        where = addresses(loaded)
        result = update_weights_from_disk(loaded.index, other_folder)
        assert result
        assert result.message == "Success"
        assert set(result.names) == set(loaded.index.names())
        assert addresses(loaded) == where
        assert same(bits(loaded), bits(other))
        assert torch.equal(logits(loaded.module), logits(other))

    def test_from_tensors_under_checkpoint_names(self, checkpoint, bits, kind):
        _, folder = checkpoint(kind)
        other, other_folder = checkpoint(kind, seed=1)
        loaded = load_model(folder)
        where = addresses(loaded)
        tensors = load_file(other_folder / "model.safetensors")
        assert update_weights_from_tensor(loaded.index, tensors.items())
        assert same(bits(loaded), bits(other))
        assert addresses(loaded) == where

    @pytest.mark.parametrize("load_format", [None, "direct"])
    def test_from_tensors_under_module_names(self, checkpoint, bits, kind, load_format):
        _, folder = checkpoint(kind)
        other, _ = checkpoint(kind, seed=1)
        loaded = load_model(folder)
        assert update_weights_from_tensor(loaded.index, other.state_dict(), load_format)
        assert same(bits(loaded), bits(other))

    def test_from_one_bucket(self, checkpoint, bits, kind):
        _, folder = checkpoint(kind)
        other, _ = checkpoint(kind, seed=1)
        loaded = load_model(folder)
        bucket = flatten(other.state_dict().items())
        assert update_weights_from_tensor(loaded.index, bucket, "flattened_bucket")
        assert same(bits(loaded), bits(other))


def test_a_refused_checkpoint_leaves_what_tensors_had_put_there(checkpoint, bits):
    """Function 70's trap: the roll-back must not read any checkpoint, old or new.

    The weights in memory come from an update by tensors; no file holds them.
    """
    _, folder = checkpoint()
    loaded = load_model(folder)
    trained = {n: torch.randn_like(t) for n, t in loaded.module.state_dict().items()}
    assert update_weights_from_tensor(loaded.index, trained)
    before = bits(loaded)
    _, bad = checkpoint(seed=1)
    tensors = load_file(bad / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, bad / "model.safetensors")
    result = update_weights_from_disk(loaded.index, bad)
    assert not result
    assert "model.norm.weight" in result.message
    assert result.names == ()
    assert same(bits(loaded), before)
    assert same(before, trained)


def test_a_failure_in_the_middle_of_a_checkpoint_leaves_the_old_weights(checkpoint, bits):
    _, folder = checkpoint()
    _, other = checkpoint(seed=1)
    loaded = load_model(folder)
    before = bits(loaded)
    calls = []

    def refresh():
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError

    loaded.index.add_refresher(refresh)
    with pytest.raises(MemoryError):
        update_weights_from_disk(loaded.index, other)
    assert same(bits(loaded), before)
    assert len(calls) == 2
    assert update_weights_from_disk(loaded.index, other)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_an_unreadable_checkpoint_is_answered_not_raised(checkpoint, bits, damage):
    _, folder = checkpoint()
    loaded = load_model(folder)
    before = bits(loaded)
    file = folder / "model.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    result = update_weights_from_disk(loaded.index, folder)
    assert not result.ok
    assert result.message
    assert same(bits(loaded), before)


@pytest.mark.parametrize(
    ("tensors", "load_format", "word"),
    [
        ({"model.nrom.weight": torch.ones(32)}, None, "model.nrom.weight"),
        ({"model.norm.weight": torch.ones(3)}, "direct", "wants"),
        ({"block_sparse_moe.gate.weight": torch.ones(4, 32)}, "direct", "block_sparse_moe"),
        ([("lm_head.weight", torch.ones(64, 32))] * 2, None, "twice"),
    ],
)
def test_a_set_that_does_not_fit_is_answered(checkpoint, bits, tensors, load_format, word):
    _, folder = checkpoint("mixtral")
    loaded = load_model(folder)
    before = bits(loaded)
    result = update_weights_from_tensor(loaded.index, tensors, load_format)
    assert not result
    assert word in result.message
    assert same(bits(loaded), before)


def test_a_part_of_a_stack_is_refused(checkpoint, bits):
    _, folder = checkpoint("mixtral")
    loaded = load_model(folder)
    before = bits(loaded)
    tensors = load_file(folder / "model.safetensors")
    part = {n: t + 1 for n, t in tensors.items() if "layers.0" in n and "experts.0." in n}
    assert part
    assert not update_weights_from_tensor(loaded.index, part)
    assert same(bits(loaded), before)


def test_a_malformed_bucket_is_answered(checkpoint):
    _, folder = checkpoint()
    bucket, entries = flatten([("lm_head.weight", torch.ones(64, 32))])
    loaded = load_model(folder)
    result = update_weights_from_tensor(
        loaded.index, (bucket[:-4], entries), "flattened_bucket"
    )
    assert not result
    assert "out of range" in result.message


def test_an_unknown_format_is_an_error(checkpoint):
    _, folder = checkpoint()
    with pytest.raises(ConfigError, match="direct, flattened_bucket"):
        update_weights_from_tensor(load_model(folder).index, [], "pickle")


def test_weights_by_name(checkpoint):
    model, folder = checkpoint("tied")
    index = load_model(folder).index
    rows = get_weights_by_name(index, "lm_head.weight", 3)
    assert torch.equal(torch.tensor(rows), model.lm_head.weight[:3])
    assert len(get_weights_by_name(index, "lm_head.weight")) == 64
    with pytest.raises(WeightsError, match="nearest"):
        get_weights_by_name(index, "lm_haed.weight")


def test_weights_by_name_of_a_scalar():
    from bedplate.models.weights import WeightIndex

    module = torch.nn.Module()
    module.scale = torch.nn.Parameter(torch.tensor(2.0))
    assert get_weights_by_name(WeightIndex(module), "scale") == [2.0]
