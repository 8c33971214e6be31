# SPDX-License-Identifier: Apache-2.0
"""Sizes that a device has no room for are refused, and the next taken, on the record.

That the estimates are no less than what compilers take is checked launch by launch with the
matrix; see ``kernels.matrix.budget``.
"""

from __future__ import annotations

import json
import logging

import pytest

from bedplate.errors import UnsupportedError
from bedplate_triton import configs, fit
from bedplate_triton.features import Features

SMALL = Features(arch="gfx942", family="cdna", wave=64, early_registers=True)
LARGE = Features(arch="sm_90", shared_bytes=227 << 10, shared_operands=True)
DECODE = {"head_dim": 128, "value_dim": 128, "group": 4, "kv_bytes": 2, "batch": 8}
EXTEND = {"head_dim": 128, "value_dim": 128, "group": 4, "bytes": 2, "rows": 4096}
TILES = {"BLOCK_N": 128, "BLOCK_G": 16, "num_warps": 8, "num_stages": 3}


@pytest.mark.parametrize(
    ("op", "sizes", "key", "features", "reason"),
    [
        # What is natural on one device asks another for 512 bytes too many.
        ("decode_attention", TILES, DECODE, SMALL, "bytes of shared memory are wanted"),
        ("decode_attention", TILES, DECODE, LARGE, ""),
        ("decode_attention", TILES | {"BLOCK_N": 64, "num_stages": 2}, DECODE, SMALL, ""),
        ("decode_attention", TILES, DECODE | {"kv_bytes": 1}, SMALL, "are wanted"),
        ("extend_attention", {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
         EXTEND, LARGE, ""),
        ("extend_attention", {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 4},
         EXTEND, LARGE, "up to 297,984 bytes"),
        ("extend_attention", {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
         EXTEND, SMALL, ""),
        ("invariant", {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128, "num_stages": 3},
         {"bytes": 2}, SMALL, "up to 148,480 bytes of shared memory are wanted, of which"),
        ("decode_step", {"num_warps": 32}, {"rows": 1024}, SMALL, "32 warps of 64"),
        ("decode_step", {"num_warps": 32}, {"rows": 1024}, LARGE, ""),
        ("sampling", {"block_warps": 4, "row_warps": 17}, {}, SMALL, "17 warps of 64"),
        ("gated", {"columns": 1 << 20, "num_warps": 4}, {}, SMALL, ""),
    ],
)  # fmt: skip
def test_judgement(op, sizes, key, features, reason):
    found = fit.refusal(op, sizes, key, features)
    assert reason in found
    assert bool(found) == bool(reason)


def test_latent_values_are_counted_once():
    key = {"head_dim": 576, "value_dim": 512, "group": 16, "kv_bytes": 2}
    whole, _most = fit.shared_bytes("decode_attention", TILES, key, SMALL)
    apart, _most = fit.shared_bytes("decode_attention", TILES, key | {"group": 1}, SMALL)
    assert apart > 1.7 * whole


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Write ``{folder: warps}`` for the operation ``op`` and use them alone."""
    monkeypatch.setattr(configs.resources, "files", lambda _package: tmp_path)
    monkeypatch.setattr(configs, "_refusals", [])
    configs._files.cache_clear()

    def write(**made):
        for folder, warps in made.items():
            place = tmp_path / "configs" / folder
            place.mkdir(parents=True)
            data = {"schema": 1, "op": "op", "default": {"num_warps": warps}, "provenance": {}}
            (place / "op.json").write_text(json.dumps(data))

    yield write
    configs._files.cache_clear()


def test_the_next_that_fits_is_taken_on_the_record(folders, caplog):
    folders(gfx942=32, cdna=24, default=4)
    with caplog.at_level(logging.WARNING):
        assert configs.choose("op", SMALL, rows=7) == {"num_warps": 4}
        configs.choose("op", SMALL, rows=7)
    (record,) = configs.refusals()
    assert (record.point, record.chosen, record.detail) == (
        "sizes.op",
        "default",
        {"rows": "7"},
    )
    assert [(c.name, c.verdict) for c in record.candidates] == [
        ("gfx942", "refused"), ("cdna", "refused"), ("default", "chosen"),
    ]  # fmt: skip
    assert "32 warps of 64 are more than 1,024 threads" in record.candidates[0].reason
    assert len(caplog.records) == 1
    assert "configs/gfx942 are not used for rows 7" in caplog.text


def test_nothing_is_recorded_where_the_first_fits(folders):
    folders(cdna=16, default=4)
    assert configs.choose("op", SMALL) == {"num_warps": 16}
    assert configs.refusals() == ()


def test_another_device_of_the_same_architecture_has_no_family(folders):
    folders(cdna=16, default=4)
    assert configs.choose("op", Features(arch="gfx942")) == {"num_warps": 4}


def test_what_may_just_fit_is_better_than_nothing():
    """64 KiB of tiles in 64 KiB: refused where something is surer, taken where nothing is."""
    sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    plain = Features()
    assert "up to 78,848 bytes" in fit.refusal("extend_attention", sizes, EXTEND, plain)
    assert fit.refusal("extend_attention", sizes, EXTEND, plain, surely=False) == ""
    key = EXTEND | {"invariant": False}
    assert configs.choose("extend_attention", plain, **key)["BLOCK_M"] == 128


def test_where_nothing_fits_every_reason_is_named(folders):
    folders(cdna=32, default=17)
    with pytest.raises(
        UnsupportedError, match=r"cdna: 32 warps .*; default: 17 warps .*rows 1"
    ):
        configs.choose("op", SMALL, rows=1)
