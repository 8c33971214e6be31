# SPDX-License-Identifier: Apache-2.0
"""The training text: conversations strung from ``tasks``, and plain lines without chat.

Called by the tokenizer training and by the packers of ``pack``; ``render`` is the Python twin
of the chat template in ``tokenizer``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from scripts.demo_model import words
from scripts.demo_model.tasks import KINDS, Sample, Turn, draw

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

__all__ = ["END_OF_TEXT", "conversation", "document", "plain", "render"]

END_OF_TEXT = "<|endoftext|>"
_NAMES = tuple(KINDS)
_SHARES = tuple(share for _, share in KINDS.values())


def render(turns: Sequence[Turn], tools: Sequence[dict[str, Any]] = ()) -> str:
    """ChatML; tools stand as JSON lines at the end of the system message."""
    turns = list(turns)
    if tools:
        system = turns.pop(0)[1] + "\n\n" if turns[0][0] == "system" else ""
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        turns.insert(0, ("system", f"{system}Tools:\n{lines}"))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def _any_sample(rng: Random) -> Sample:
    return draw(rng, rng.choices(_NAMES, _SHARES)[0])


def _turn_count(rng: Random, long: bool) -> int:
    if long and rng.random() < 0.25:
        return rng.randint(8, 24)
    return 1 if rng.random() < 0.6 else rng.randint(2, 5)


def conversation(rng: Random, *, long: bool = False) -> str:
    """One to five tasks in a row (``long``: at times up to 24), with or without a system text.

    Follow-up questions of one task may come after other tasks, so that facts must be kept.
    """
    turns: list[Turn] = []
    system: list[str] = [rng.choice(words.SYSTEMS)] if rng.random() < 0.4 else []
    tools: list[dict[str, Any]] = []
    pending: list[tuple[str, str]] = []
    told: set[str] = set()
    for _ in range(_turn_count(rng, long)):
        sample = _any_sample(rng)
        if sample.kind in told:
            continue  # a second set of facts would make the questions ambiguous
        told.update({sample.kind} & {"names", "retrieve"})
        body = list(sample.turns)
        if body[0][0] == "system":
            system.append(body.pop(0)[1])
        turns += [*body, ("assistant", sample.answer)]
        tools += [tool for tool in sample.tools if tool not in tools]
        if rng.random() < 0.5:
            pending += sample.follow_ups
        if pending and rng.random() < 0.6:
            question, answer = pending.pop()
            turns += [("user", question), ("assistant", answer)]
    for question, answer in pending:
        turns += [("user", question), ("assistant", answer)]
    if system:
        turns.insert(0, ("system", " ".join(system)))
    return render(turns, tools) + END_OF_TEXT


def plain(rng: Random) -> str:
    """Questions and answers, or answers alone, as bare text."""
    lines = []
    for _ in range(rng.randint(1, 3)):
        sample = _any_sample(rng)
        if sample.tools or len(sample.turns) > 1:
            continue
        asked = rng.random() < 0.6
        lines.append((sample.turns[0][1] + "\n" if asked else "") + sample.answer)
    return "\n\n".join(lines) + END_OF_TEXT


def document(rng: Random, *, long: bool = False) -> str:
    """One training document, ended by ``END_OF_TEXT``."""
    return plain(rng) if rng.random() < 0.06 else conversation(rng, long=long)
