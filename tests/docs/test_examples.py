# SPDX-License-Identifier: Apache-2.0
"""Examples run as they are, on the demo model."""

from __future__ import annotations

import runpy

from tests.docs.blocks import ROOT


def output_of(name: str, capsys) -> str:
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return capsys.readouterr().out


def test_generate_answers(capsys):
    assert "42" in output_of("01_generate.py", capsys)


def test_stream_arrives_in_pieces(capsys):
    out = output_of("02_stream.py", capsys)
    assert int(out.rsplit("(", 1)[1].split()[0]) > 1


def test_a_look_inside_shows_both_kinds_of_pass(capsys):
    out = output_of("03_look_inside_a_batch.py", capsys)
    assert "EXTEND" in out
    assert "DECODE" in out
    assert out.strip().endswith("the same tokens as Engine.generate: True")
