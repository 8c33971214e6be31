# SPDX-License-Identifier: Apache-2.0
"""``bedplate bisect-kernels``: which kernel makes a check fail."""

from __future__ import annotations

__all__ = ["agree", "command", "first_bad"]

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bedplate import env
from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

CLOSE = 0.25
"""Nats: log-probabilities this close are the same, and two tokens this close may change
places."""


@click.command("bisect-kernels")
@click.option("-p", "--prompt", "prompts", multiple=True, help="A prompt; may be repeated.")
@click.option("--model", help="Folder of a checkpoint. Default: the demo model.")
@click.option("--backend", help="Backend to look at.")
@click.option("-n", "--max-tokens", type=int, default=32, show_default=True, help="Per prompt.")
@click.argument("check", nargs=-1, type=click.UNPROCESSED)
def command(
    *,
    prompts: tuple[str, ...],
    model: str | None,
    backend: str | None,
    max_tokens: int,
    check: tuple[str, ...],
) -> None:
    """Find the kernel that makes CHECK fail, by running it with fewer and fewer of them.

    CHECK is a command after `--` that exits with 0 when all is well.  Without one, the answers
    to the prompts are compared with those of plain torch, as far as both are sure of them.

    64 kernels take at most seven runs of the check.  Exit status 1 if a kernel was found.

    \b
    Examples:
      bedplate bisect-kernels -- pytest tests/test_answers.py
      bedplate bisect-kernels --model ./checkpoint -p "What is 12 + 30?"
    """  # noqa: D301 - click reads the control character
    if bool(check) == bool(prompts):
        raise ConfigError(
            "bisect-kernels needs either prompts (-p TEXT) or a command after `--` that fails."
        )
    with tempfile.TemporaryDirectory() as folder:
        runs = _Runs(Path(folder) / "kernels")
        if check:
            good = lambda limit: runs.run(check, limit).returncode == 0  # noqa: E731
        else:
            ask = _question(prompts, model, backend, max_tokens)
            wanted = _answers(runs.run(ask, 0))
            if not wanted:
                raise ConfigError(
                    f"Plain torch gives no answer to compare with. Run it by itself, with "
                    f"{env.FUEL.name}=0: {shlex.join(ask)}"
                )
            good = lambda limit: agree(_answers(runs.run(ask, limit)), wanted)  # noqa: E731
        _report(runs, good)


class _Runs:
    """Runs a command with so much fuel, and counts.

    Attributes:
        kernels: What was in use in the last run without a limit, in order.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.kernels: list[str] = []
        self.count = 0

    def run(
        self, command: Sequence[str], limit: int | None
    ) -> subprocess.CompletedProcess[bytes]:
        """One run; its output is shown only if the caller reads it."""
        self._file.unlink(missing_ok=True)
        environment = env.with_fuel(limit, str(self._file))
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        if limit is None and self._file.exists():
            self.kernels = list(dict.fromkeys(self._file.read_text("utf-8").splitlines()))
        self.count += 1
        return done

    def say(self, limit: int | None, *, good: bool) -> None:
        """One line a run."""
        amount = "all kernels" if limit is None else f"the first {limit} kernels"
        click.echo(f"run {self.count}: {amount}: {'good' if good else 'bad'}", err=True)


def first_bad(count: int, good: Callable[[int], bool]) -> int:
    """The smallest limit of 1 … ``count`` that is not good, given that ``count`` is not.

    Asks ``good`` at most ⌈log2(count)⌉ times.
    """
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if good(middle):
            low = middle
        else:
            high = middle
    return high


def agree(answers: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether answers are the same wherever the wanted ones are sure of themselves."""
    return len(answers) == len(wanted) and all(
        _same(got, want) for got, want in zip(answers, wanted, strict=True)
    )


def _report(runs: _Runs, good: Callable[[int | None], bool]) -> None:
    def tell(limit: int | None) -> bool:
        answer = good(limit)
        runs.say(limit, good=answer)
        return answer

    if tell(None):
        click.echo("The check is good with all kernels: there is nothing to find.")
        return
    kernels = runs.kernels
    if not kernels:
        raise ConfigError(
            "The check fails, and no kernel was in use: the cause is elsewhere, or the command "
            "starts no engine. Run it by itself."
        )
    place = first_bad(len(kernels), tell)
    click.echo(f"Kernel {place} of {len(kernels)}: {kernels[place - 1]}")
    if place == 1:
        click.echo(f"If the check also fails with {env.FUEL.name}=0, the cause is elsewhere.")
    else:
        click.echo(f"Good with {env.FUEL.name}={place - 1}, bad with {env.FUEL.name}={place}.")
    sys.exit(1)


def _question(
    prompts: Sequence[str], model: str | None, backend: str | None, max_tokens: int
) -> list[str]:
    command = [sys.executable, "-m", "bedplate", "generate", "--json", "--logprobs", "2"]
    command += [part for prompt in prompts for part in ("-p", prompt)]
    command += ["--max-tokens", str(max_tokens)]
    command += [] if backend is None else ["--backend", backend]
    return command if model is None else [*command, model]


def _answers(done: subprocess.CompletedProcess[bytes]) -> list[Any]:
    """One per prompt; none from a run that failed."""
    if done.returncode:
        return []
    return [json.loads(line) for line in done.stdout.splitlines()]


def _same(got: Any, want: Any) -> bool:
    """Token by token, until one differs where two were about equally likely."""
    for mine, theirs in zip(got["logprobs"], want["logprobs"], strict=False):
        if mine["token_id"] != theirs["token_id"]:
            (_, best), (_, second) = theirs["top"]
            return bool(best - second < CLOSE)
        if abs(mine["logprob"] - theirs["logprob"]) > CLOSE:
            return False
    return len(got["logprobs"]) == len(want["logprobs"])
