# SPDX-License-Identifier: Apache-2.0
"""The bundled demo model still answers what its card promises."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch
from scripts.demo_model.corpus import render
from scripts.demo_model.grade import (
    Generate,
    Question,
    count_exact,
    grade,
    questions,
    table,
    top2_margins,
    transformers_generate,
)
from scripts.demo_model.tasks import GRADED, KINDS, draw, held_out
from transformers import AutoModelForCausalLM, AutoTokenizer

from bedplate import Engine, SamplingParams, demo

PROMISED = 0.95
SEED = 20


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine():
    with Engine(backend="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def generate(engine) -> Generate:
    """Greedy answers of the whole engine, in the dtype that it chooses by itself."""
    params = SamplingParams(max_tokens=160)

    def answer(prompts: list[str]) -> list[str]:
        ids = [engine.tokenizer.encode(prompt) for prompt in prompts]
        return [output.text for output in engine.generate(ids, params)]

    return answer


def test_fresh_questions_of_every_kind_are_answered_exactly(generate: Generate) -> None:
    scores = grade(generate, questions(SEED, per_kind=5))
    exact = sum(score.exact for score in scores)
    total = sum(score.total for score in scores)
    assert [score.kind for score in scores] == list(GRADED)
    assert exact >= PROMISED * total, table(scores)
    assert all(score.exact >= score.total - 2 for score in scores), table(scores)


def test_the_engine_writes_what_transformers_writes(model, tokenizer) -> None:
    """Greedy parity on trained weights: margins are wide, so every answer must be equal."""
    asked = [question.prompt for question in questions(SEED + 1, per_kind=3)]
    params = SamplingParams(max_tokens=160)
    with Engine(backend="cpu", dtype="float32") as opened:
        ids = [opened.tokenizer.encode(prompt) for prompt in asked]
        ours = [output.text for output in opened.generate(ids, params)]
    assert ours == transformers_generate(model, tokenizer, batch=40)(asked)


def test_the_best_token_leads_clearly(model, tokenizer) -> None:
    margins = top2_margins(model, tokenizer, questions(SEED, per_kind=3))
    assert (margins > 1.0).float().mean() > 0.99


@pytest.mark.parametrize("system", ["", "Answer briefly."])
def test_earlier_turns_are_remembered(generate: Generate, system: str) -> None:
    turns = [("system", system)] if system else []
    turns += [
        ("user", "My name is Ada."), ("assistant", "Nice to meet you, Ada!"),
        ("user", "What is 20 + 22?"), ("assistant", "20 + 22 = 42."),
        ("user", "What is my name?"),
    ]  # fmt: skip
    prompt = render(turns) + "<|im_start|>assistant\n"
    assert generate([prompt]) == ["Your name is Ada."]


@pytest.mark.parametrize("kind", KINDS)
def test_the_chat_template_writes_what_training_saw(tokenizer, kind: str) -> None:
    rng = Random(kind)
    for _ in range(20):
        sample = draw(rng, kind)
        written = tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in sample.turns],
            tools=[{"type": "function", "function": tool} for tool in sample.tools] or None,
            tokenize=False,
            add_generation_prompt=True,
        )
        expected = render(sample.turns, sample.tools) + "<|im_start|>assistant\n"
        assert written == expected


def test_the_template_writes_tool_calls_as_the_model_does(tokenizer) -> None:
    call = {"name": "get_time", "arguments": {"city": "Kuala Lumpur", "exact": True}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": call}, call]},
    ]
    written = tokenizer.apply_chat_template(messages, tokenize=False)
    body = written.partition("assistant\n")[2].removesuffix("<|im_end|>\n")
    calls = body.replace("</tool_call>", "").split("<tool_call>")[1:]
    assert [json.loads(text) for text in calls] == [call, call]


def test_any_text_survives_the_tokenizer(tokenizer) -> None:
    text = "Grüße, नमस्ते 🏛️\n\n\tdef f(x):\r\n    return 1234567  # <tool_call> こんにちは "
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_graded_sums_are_of_pairs_that_training_leaves_out() -> None:
    rng = Random(1)
    for fresh in (False, True):
        samples = [draw(rng, kind, fresh=fresh) for kind in ("add", "subtract") * 50]
        for sample in samples:
            left, _, right = sample.answer.split()[:3]
            assert held_out(int(left), int(right)) is fresh


def test_a_wrong_answer_is_counted_and_kept() -> None:
    asked = [Question(kind="add", prompt=str(i), answer=str(i)) for i in range(3)]
    (score,) = count_exact(asked, ["0", "7", " 2\n"])
    assert (score.exact, score.total) == (2, 3)
    assert score.wrong == ((asked[1], "7"),)


def test_the_files_stay_small() -> None:
    assert sum(file.stat().st_size for file in demo.path().iterdir() if file.is_file()) <= 12e6
