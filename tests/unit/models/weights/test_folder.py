# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest

from bedplate.errors import ModelNotFoundError, WeightsError
from bedplate.models.weights.folder import find_weight_files, require_config


def touch(folder, *names):
    for name in names:
        (folder / name).write_text("{}")


def test_a_folder_with_a_config_is_accepted(tmp_path):
    touch(tmp_path, "config.json")
    assert require_config(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("names", "asked", "words"),
    [
        ((), "nowhere", ["no such folder", "does not download"]),
        (("a.txt",), "a.txt", ["it is a file"]),
        (("a.txt", "b.txt"), ".", ["config.json", "a.txt, b.txt"]),
        ((), ".", ["holds nothing"]),
        (tuple(f"{n:02}" for n in range(20)), ".", ["00, 01", "and 8 more"]),
    ],
)
def test_what_is_not_a_checkpoint_is_refused_with_what_was_found(tmp_path, names, asked, words):
    touch(tmp_path, *names)
    with pytest.raises(ModelNotFoundError) as error:
        require_config(tmp_path / asked)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("model.safetensors", "other.safetensors"), ["model.safetensors"]),
        (("b.safetensors", "a.safetensors"), ["a.safetensors", "b.safetensors"]),
        (
            ("consolidated.safetensors", "adapter_model.safetensors", "m.safetensors"),
            ["m.safetensors"],
        ),
    ],
)
def test_the_files_of_the_checkpoint_are_chosen(tmp_path, names, chosen):
    touch(tmp_path, *names)
    assert [file.name for file in find_weight_files(tmp_path)] == chosen


def test_the_index_decides_over_everything_else(tmp_path):
    touch(tmp_path, "model.safetensors", "x-2.safetensors", "x-1.safetensors")
    index = {
        "weight_map": {"a": "x-2.safetensors", "b": "x-1.safetensors", "c": "x-1.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [f.name for f in find_weight_files(tmp_path)] == [
        "x-1.safetensors",
        "x-2.safetensors",
    ]


def test_all_shards_that_the_index_names_in_vain_are_listed(tmp_path):
    touch(tmp_path, "x-1.safetensors")
    index = {
        "weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors", "c": "x-3.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"x-2.safetensors, x-3.safetensors") as error:
        find_weight_files(tmp_path)
    assert error.value.facts["files"] == ("x-2.safetensors", "x-3.safetensors")


@pytest.mark.parametrize("text", ["not json", "{}", "[]", '{"weight_map": 3}'])
def test_a_broken_index_is_an_error_that_names_it(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="cannot be read as an index"):
        find_weight_files(tmp_path)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("pytorch_model.bin",), ["pytorch_model.bin", "refused", "save_pretrained"]),
        (("config.json",), ["only config.json", "dummy"]),
    ],
)
def test_no_safetensors_says_what_to_do(tmp_path, names, words):
    touch(tmp_path, *names)
    with pytest.raises(ModelNotFoundError) as error:
        find_weight_files(tmp_path)
    assert all(word in str(error.value) for word in words)


def test_no_folder(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        find_weight_files(tmp_path / "gone")
