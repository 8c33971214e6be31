# SPDX-License-Identifier: Apache-2.0
"""Run the kit on mutants: ``python -m tests.conformance.kill`` prints and writes the table."""

from __future__ import annotations

import gc
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tests.conformance import mutants
from tests.conformance.mutants.base import NAME, Mutant

from bedplate.conformance.check import matching
from bedplate.conformance.examine import all_checks, examine
from bedplate.conformance.subject import Subject
from bedplate.errors import BedplateError
from bedplate.testing.fake_plugins import fake_plugins

HEAVY = {"L0/import_is_light"}
"""All mutants lie in one module, which loads torch; only the one that is about it is asked."""
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "conformance-mutants.md"


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What became of a mutant; ``check`` is empty for a survivor."""

    name: str
    mutant: Mutant
    check: str
    reason: str
    seconds: float


@contextmanager
def subject_of(name):
    """The subject of one mutant; whatever it changed in the process is changed back."""
    collect, gc.collect = gc.collect, lambda *_: 0  # most of the time of a capture here
    state = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
    with fake_plugins() as fakes:
        fakes.distribution(
            f"bedplate-{NAME}",
            entries=f"[bedplate.backends]\n{NAME} = tests.conformance.mutants:{name}\n",
        )
        subject = Subject(NAME, path=fakes.path)
        try:
            yield subject
        finally:
            try:
                subject.close()
            finally:
                gc.collect = collect
                torch.set_num_threads(state[0])
                torch.set_default_dtype(state[1])
                torch.set_grad_enabled(state[2])
                vars(sys.modules["bedplate.memory.factory"]).pop("patched", None)


def results(subject, level, only="*"):
    """Results of one level up to the first failure."""
    found = []
    for check in all_checks(subject, [level]):
        if matching(check.id, only) and (only != "*" or check.id not in HEAVY):
            found.append(examine(check, subject))
            if found[-1].outcome == "failed":
                break
    return found


def kill(name) -> Kill:
    """Try to find what is wrong with a mutant."""
    mutant = mutants.MUTANTS[name]
    begin = time.perf_counter()
    with subject_of(name) as subject:
        try:
            last = results(subject, mutant.level, mutant.only)[-1]
            found = (last.check, last.reason) if last.outcome == "failed" else ("", "")
        except BedplateError as error:
            found = ("the door", str(error))
    seconds = time.perf_counter() - begin
    return Kill(name=name, mutant=mutant, check=found[0], reason=found[1], seconds=seconds)


def table(kills) -> str:
    """Markdown rows, by level."""
    rows = ["| mutant | what is wrong | found by |", "|---|---|---|"]
    for one in sorted(kills, key=lambda k: (k.mutant.level, k.name)):
        why = mutants.SURVIVORS.get(one.name, "")
        by = f"`{one.check}`" if one.check else f"survives: {why}"
        rows.append(f"| `{one.name}` | {one.mutant.what} | {by} |")
    return "\n".join(rows)


def page(kills) -> str:
    """The whole page of the documentation."""
    dead = sum(bool(one.check) for one in kills)
    return "\n".join([
        "# What the conformance kit finds",
        "",
        "The kit is tested by backends that are wrong on purpose: each has one mistake.",
        f"It finds {dead} of {len(kills)}, {dead / len(kills):.0%}.",
        "`python -m tests.conformance.kill` writes this page, and a test compares it.",
        "",
        table(kills),
        "",
    ])  # fmt: skip


def main(names):
    begin = time.perf_counter()
    kills = []
    for name in names or mutants.MUTANTS:
        kills.append(kill(name))
        one = kills[-1]
        print(f"{one.seconds:6.2f}  L{one.mutant.level}  {name:32s} {one.check or 'SURVIVES'}")
    dead = sum(bool(one.check) for one in kills)
    print(f"{dead} of {len(kills)} found in {time.perf_counter() - begin:.0f} s")
    if not names:
        PAGE.write_text(page(kills), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
