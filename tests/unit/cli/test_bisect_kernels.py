# SPDX-License-Identifier: Apache-2.0
"""A bad kernel is found by running a check with fewer and fewer of them."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from bedplate.cli import bisect_kernels
from bedplate.cli.bisect_kernels import agree, first_bad
from bedplate.cli.main import cli
from bedplate.errors import ConfigError

CHECK = """
import os, sys
from bedplate.registry.fuel import Fuel
fuel = Fuel.from_environment(os.environ)
used = [place for place in range({count}) if fuel.take(f"kernel of layer {{place}}")]
sys.exit({bad} in used)
"""


@pytest.fixture
def bisect():
    def go(*arguments):
        return CliRunner().invoke(cli, ["bisect-kernels", *arguments])

    return go


@pytest.mark.parametrize("count", [1, 2, 3, 7, 33, 64])
def test_the_first_bad_one_is_found_in_log2_questions(count):
    for culprit in range(1, count + 1):
        asked = []
        assert first_bad(count, lambda n, c=culprit, a=asked: a.append(n) or n < c) == culprit
        assert len(asked) <= (count - 1).bit_length()
        assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("bad", [0, 37])
def test_one_among_64_takes_at_most_seven_runs(bisect, bad):
    check = CHECK.format(count=64, bad=bad)
    done = bisect("--", sys.executable, "-c", check)
    assert done.exit_code == 1, done.output
    assert f"Kernel {bad + 1} of 64: kernel of layer {bad}\n" in done.output
    runs = re.findall(r"^run (\d+): .*: (good|bad)$", done.output, re.MULTILINE)
    assert [int(number) for number, _ in runs] == list(range(1, len(runs) + 1))
    assert len(runs) <= 7
    follow = f"BEDPLATE_FUEL={bad}, bad with BEDPLATE_FUEL={bad + 1}" if bad else "elsewhere"
    assert follow in done.output


def test_nothing_wrong_is_nothing_found(bisect):
    done = bisect("--", sys.executable, "-c", "")
    assert done.exit_code == 0
    assert "nothing to find" in done.output


def test_a_check_without_kernels_cannot_be_searched(bisect):
    failure = bisect("--", sys.executable, "-c", "raise SystemExit(1)").exception
    assert isinstance(failure, ConfigError)
    assert "no kernel was in use" in str(failure)


def test_either_prompts_or_a_command(bisect):
    for arguments in ((), ("-p", "x", "--", "true")):
        assert isinstance(bisect(*arguments).exception, ConfigError)


def test_a_reference_that_fails_is_named(bisect, monkeypatch):
    def fails(command, **_options):
        assert command[2:4] == ["bedplate", "generate"]
        return subprocess.CompletedProcess(command, 1, stdout="")

    monkeypatch.setattr(bisect_kernels.subprocess, "run", fails)
    failure = bisect("-p", "x", "--backend", "nobody").exception
    assert isinstance(failure, ConfigError)
    assert "generate --json" in str(failure)


def answer(*tokens):
    return {"logprobs": [{"token_id": t, "logprob": p, "top": [[t, p], [99, p - gap]]}
                         for t, p, gap in tokens]}  # fmt: skip


SURE, TORN = (1, -0.1, 5.0), (1, -0.7, 0.01)


@pytest.mark.parametrize(
    ("got", "want", "same"),
    [
        ([SURE, SURE], [SURE, SURE], True),
        ([SURE, (2, -0.1, 5.0)], [SURE, SURE], False),
        ([SURE, (2, -0.1, 5.0)], [SURE, TORN], True),
        ([(2, -0.1, 5.0), SURE], [TORN, (3, -0.1, 5.0)], True),
        ([(1, -0.6, 5.0)], [SURE], False),
        ([(1, -0.2, 5.0)], [SURE], True),
        ([SURE], [SURE, SURE], False),
    ],
)
def test_answers_agree_where_the_wanted_ones_are_sure(got, want, same):
    assert agree([answer(*got)], [answer(*want)]) == same
    assert not agree([], [answer(*want)])
