# SPDX-License-Identifier: Apache-2.0
"""``bedplate generate``: the main job, as a person types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from bedplate import demo
from bedplate.cli.main import cli


@pytest.fixture
def run(capfd):
    def invoke(*arguments, stdin=None):
        return CliRunner().invoke(cli, ["generate", *arguments], input=stdin)

    return invoke


def test_no_model_named_uses_the_demo_model_and_says_so(run):
    result = run("-p", "What is 12 + 30?")
    assert result.exit_code == 0, result.stderr
    assert "42" in result.stdout
    assert "demo model" in result.stderr


def test_several_prompts_run_as_one_batch_in_order(run):
    result = run("-p", "What is 12 + 30?", "-p", "What is the capital of France?", "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == [
        "What is 12 + 30?",
        "What is the capital of France?",
    ]
    assert "42" in rows[0]["text"]
    assert "Paris" in rows[1]["text"]
    assert {"text", "token_ids", "finish_reason"} <= rows[0].keys()


def test_prompts_come_from_a_file_or_a_pipe(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("What is 2 + 2?\n\nWhat is the capital of Italy?\n")
    result = run("-f", str(file), "--json")
    assert len(result.stdout.splitlines()) == 2
    piped = run("--json", stdin="What is the capital of Italy?")
    assert "Rome" in json.loads(piped.stdout)["text"]


def test_a_folder_is_a_model(run):
    result = run(str(demo.path()), "-p", "What is the capital of Spain?", "--backend", "cpu")
    assert "Madrid" in result.stdout
    assert "demo model" not in result.stderr


def test_streamed_text_equals_the_text_of_a_batch(run):
    question = "Greet me in Greek"
    streamed = run("-p", question).stdout
    batch = json.loads(run("-p", question, "--json").stdout)
    assert streamed.strip() == batch["text"].strip()
    assert "\ufffd" not in streamed


def test_sampling_with_a_seed_repeats_itself(run):
    ask = ("-p", "Tell me a story.", "-t", "1.0", "--top-p", "0.95", "--seed", "3", "-n", "40")
    assert run(*ask).stdout == run(*ask).stdout
    other = run(*ask[:-3], "4", "-n", "40")
    assert other.stdout != run(*ask).stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("-p", "x", "--backend", "cudda"), 3, "HW001"),
        (("-p", "x", "--dtype", "float13"), 2, "dtype"),
        (("/nowhere", "-p", "x"), 6, "/nowhere"),
        (("-p", "x", "-t", "-1"), 2, "temperature"),
        (("-p", "x", "--max-total-tokens", "1"), 7, "max_total_tokens"),
        (("-p", "x", "--attention", "magic"), 4, "magic"),
        ((), 2, "prompt"),
    ],
)
def test_mistakes_get_a_sentence_a_code_and_an_exit_status(arguments, status, said):
    done = subprocess.run(
        [sys.executable, "-m", "bedplate", "generate", *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
