# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from bedplate.errors import WeightsError
from bedplate.models.weights.sources import SafetensorsSource, TensorSource


def test_headers_are_known_before_anything_is_read(tmp_path):
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, tmp_path / "x")
    save_file({"c": torch.arange(3)}, tmp_path / "y")
    with SafetensorsSource([tmp_path / "x", tmp_path / "y"]) as source:
        seen = {i.name: (i.shape, i.dtype, i.origin, i.nbytes) for i in source.infos.values()}
        assert torch.equal(source.read("c"), torch.arange(3))
    assert seen == {
        "a": ((2, 3), torch.float32, "x", 24),
        "b": ((4,), torch.bfloat16, "x", 8),
        "c": ((3,), torch.int64, "y", 24),
    }


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "length"])
def test_a_damaged_file_is_named(tmp_path, damage):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(64)}, file)
    data = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "cut": data[:-16],
            "header": data[:8] + b"#" * (len(data) - 8),
            "length": struct.pack("<Q", 1 << 40) + data[8:],
        }[damage]
    )
    with pytest.raises(WeightsError, match=r"model.safetensors is not a readable") as error:
        SafetensorsSource([file])
    assert error.value.facts["files"] == ("model.safetensors",)
    assert "Copy it again" in str(error.value)


def test_a_tensor_in_two_files_is_refused_with_both(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x")
    save_file({"a": torch.ones(1)}, tmp_path / "y")
    with pytest.raises(WeightsError, match="a is in both x and y"):
        SafetensorsSource([tmp_path / "x", tmp_path / "y"])


def test_an_unknown_dtype_is_refused_by_its_word(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(WeightsError, match="a in x is stored as F4"):
        SafetensorsSource([tmp_path / "x"])


@pytest.mark.parametrize("form", [dict, list])
def test_given_tensors(form):
    tensor = torch.ones(2)
    source = TensorSource(form({"a": tensor}.items()))
    assert source.infos["a"].shape == (2,)
    assert source.read("a").data_ptr() == tensor.data_ptr()


def test_a_name_given_twice_is_refused():
    with pytest.raises(WeightsError, match="a is given twice"):
        TensorSource([("a", torch.ones(1)), ("a", torch.ones(1))])
