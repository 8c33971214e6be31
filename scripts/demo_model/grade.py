# SPDX-License-Identifier: Apache-2.0
"""Asks the demo model fresh questions of every kind and counts exact answers.

Works on any callable from prompts to answers, so that an engine can be graded as well::

    python -m scripts.demo_model.grade core/bedplate/demo --per-kind 50 --margins
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from scripts.demo_model.corpus import render
from scripts.demo_model.tasks import GRADED, draw
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

__all__ = [
    "Generate",
    "Question",
    "Score",
    "count_exact",
    "grade",
    "questions",
    "table",
    "top2_margins",
    "transformers_generate",
]

Generate = Callable[[list[str]], list[str]]
"""Prompts, chat marks included, to answers (without the end mark), greedy."""

MAX_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A prompt ready for the model and its exact answer."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Exact answers of one kind, and the questions that went wrong with what came back."""

    kind: str
    exact: int
    total: int
    wrong: tuple[tuple[Question, str], ...]


def questions(seed: int, per_kind: int, kinds: Sequence[str] = GRADED) -> list[Question]:
    """``per_kind`` questions of each kind; sums and differences of pairs never trained on."""
    drawn = []
    for kind in kinds:
        rng = Random(f"grade {seed} {kind}")
        for _ in range(per_kind):
            sample = draw(rng, kind, fresh=True)
            prompt = render(sample.turns, sample.tools) + "<|im_start|>assistant\n"
            drawn.append(Question(kind=kind, prompt=prompt, answer=sample.answer))
    return drawn


def grade(generate: Generate, asked: Sequence[Question]) -> list[Score]:
    """Scores by kind, in the order of first appearance."""
    return count_exact(asked, generate([question.prompt for question in asked]))


def count_exact(asked: Sequence[Question], answers: Sequence[str]) -> list[Score]:
    """The same for answers that are there already."""
    pairs = list(zip(asked, (answer.strip() for answer in answers), strict=True))
    scores = []
    for kind in dict.fromkeys(question.kind for question in asked):
        of_kind = [pair for pair in pairs if pair[0].kind == kind]
        wrong = tuple(pair for pair in of_kind if pair[0].answer != pair[1])
        scores.append(
            Score(kind=kind, exact=len(of_kind) - len(wrong), total=len(of_kind), wrong=wrong)
        )
    return scores


def table(scores: Sequence[Score]) -> str:
    """Kind, exact and total in columns, with the sum below."""
    rows = [(score.kind, score.exact, score.total) for score in scores]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = ["kind        exact  total"]
    lines += [f"{kind:<10}  {exact:5d}  {total:5d}" for kind, exact, total in rows]
    return "\n".join(lines)


def transformers_generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int = 256
) -> Generate:
    """Greedy answers by transformers itself, prompts of similar length together."""

    def answer(prompts: list[str]) -> list[str]:
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        with torch.inference_mode():
            found = model.generate(
                **inputs.to(model.device), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
            )
        new = found[:, inputs["input_ids"].shape[1] :]
        return list(tokenizer.batch_decode(new, skip_special_tokens=True))

    def generate(prompts: list[str]) -> list[str]:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch]
            for index, text in zip(chosen, answer([prompts[i] for i in chosen]), strict=True):
                answers[index] = text
        return answers

    return generate


def top2_margins(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question]
) -> torch.Tensor:
    """Lead of the best logit over the second at each token of the true answers (1-D, float32).

    Negative where the best token is not the true one.
    """
    margins = []
    for question in asked:
        start = len(tokenizer(question.prompt)["input_ids"])
        ids = tokenizer(question.prompt + question.answer + "<|im_end|>", return_tensors="pt")
        tokens = ids["input_ids"].to(model.device)
        with torch.inference_mode():
            logits = model(tokens).logits[0, start - 1 : -1].float()
        best, second = logits.topk(2).values.unbind(-1)
        right = logits.argmax(-1) == tokens[0, start:]
        margins.append(torch.where(right, best - second, second - best).cpu())
    return torch.cat(margins)


def _report(folder: Path, per_kind: int, seed: int, margins: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    asked = questions(seed, per_kind)
    answers = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
        answers[dtype] = transformers_generate(model, tokenizer)([q.prompt for q in asked])
        scores = count_exact(asked, answers[dtype])
        print(f"{dtype} on {device.type}, seed {seed}\n{table(scores)}")
        for score in scores if dtype == torch.float32 else ():
            for question, got in score.wrong[:4]:
                print(f"  wrong {score.kind}: {question.prompt[-160:]!r} -> {got!r}, "
                      f"not {question.answer!r}")  # fmt: skip
        if margins:
            found = top2_margins(model, tokenizer, asked)
            marks = torch.tensor([0.001, 0.01, 0.1, 0.5])
            text = ", ".join(f"{value:.2f}" for value in found.quantile(marks).tolist())
            print(f"top-2 margins of {len(found)} answer tokens: {text} at 0.1, 1, 10, 50 %")
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    print(f"float32 and bfloat16 give the same text on {same} of {len(asked)}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-kind", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--margins", action="store_true")
    args = parser.parse_args()
    _report(args.folder, args.per_kind, args.seed, args.margins)


if __name__ == "__main__":
    main()
