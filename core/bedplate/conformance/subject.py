# SPDX-License-Identifier: Apache-2.0
"""Subject: the backend under examination, opened through the public door by its name.

What is opened is kept until ``close``: most checks share one activation.  A check that needs a
start of its own calls ``open``.
"""

from __future__ import annotations

__all__ = ["Opened", "Subject", "process_state"]

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch

from bedplate import env
from bedplate.config import EngineConfig
from bedplate.conformance.check import matching
from bedplate.contract.conformance import ConformanceProfile
from bedplate.errors import ConfigError, ContractError
from bedplate.reference.ops import OPERATIONS
from bedplate.registry import DecisionLog, open_backend, survey
from bedplate.registry.probe import probe_backends
from bedplate.registry.select import BackendRequest, parse_request, select_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from bedplate.contract.capabilities import BackendCapabilities
    from bedplate.registry.bind import BoundBackend
    from bedplate.registry.records import PluginRecord, Survey

Kept = TypeVar("Kept")


@runtime_checkable
class Closing(Protocol):
    """What is kept and wants to be closed."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """An activated backend and the choices of its start."""

    bound: BoundBackend
    decisions: DecisionLog


class Subject:
    """One backend.

    Args:
        name: ``NAME`` or ``NAME:INDEX``; never ``auto``, so that nothing else is certified
            by accident.
        path: Folders to search for metadata; ``sys.path`` when not given.

    Attributes:
        ops_trace: File of ``bedplate trace-ops`` whose calls are cases, too.
        baseline: Number of level 7 by check in an earlier report.
        found: ``process_state`` before anything was opened.

    Raises:
        ConfigError: The name is no name of one backend.
    """

    def __init__(self, name: str, *, path: Sequence[str] | None = None) -> None:
        self._request = BackendRequest(text=name, source="the conformance kit")
        wanted = parse_request(self._request)
        if len(wanted) != 1:
            raise ConfigError(
                f"The kit examines one backend, and '{name}' does not name one. Say which: "
                "--backend NAME; to see names: `bedplate backends`"
            )
        self.name = name
        self.path = path
        self.ops_trace: Path | None = None
        self.baseline: dict[str, dict[str, float]] = {}
        self.found = process_state()
        self._kept: dict[str, Any] = {}
        self._check = ""

    @cached_property
    def survey(self) -> Survey:
        """What enumeration, inspection and the probe of this backend found.

        Its hooks are never sealed: checks may ask them.
        """
        found = survey(path=self.path, probe=False)
        (wanted,) = parse_request(self._request)
        return probe_backends(found, env.environment(), names=[wanted.name])

    @property
    def record(self) -> PluginRecord:
        """The backend's own record.

        Raises:
            BackendError: It cannot be used here.
        """
        selection = select_backend(self._request, self.survey)
        if selection.error is not None:
            raise selection.error
        assert selection.record is not None
        return selection.record

    @cached_property
    def profile(self) -> ConformanceProfile:
        """What the backend says of its tolerances and gaps; nothing, if it cannot be used.

        Level 0 says so: an unreadable profile excuses nobody.
        """
        try:
            return self.read_profile()
        except Exception:
            return ConformanceProfile()

    def read_profile(self) -> ConformanceProfile:
        """Ask for the profile, and check it.

        Raises:
            ContractError: The answer is no profile, or a gap has no reason, link or day.
        """
        assert self.survey.hooks is not None
        answer = self.survey.hooks.call(self.record.key, "bedplate_conformance_profile")
        profile = ConformanceProfile() if answer is None else answer
        problems = _problems(profile)
        if problems:
            raise ContractError(
                f"The conformance profile of '{self.name}' cannot be used: "
                f"{'; '.join(problems)}. Correct bedplate_conformance_profile"
            )
        return profile

    @cached_property
    def opened(self) -> Opened:
        """The activation that checks share."""
        return self._open(EngineConfig(backend=self.name))

    @property
    def bound(self) -> BoundBackend:
        """The shared activation's record."""
        return self.opened.bound

    @property
    def capabilities(self) -> BackendCapabilities:
        """What the device can do, by its own word."""
        return self.bound.capabilities

    @property
    def page_size(self) -> int:
        """Tokens a page where a check needs some: the backend's first choice."""
        return self.capabilities.memory.page_sizes[0]

    @property
    def device(self) -> torch.device:
        """Where tensors of checks lie."""
        return self.bound.runtime.device

    @contextmanager
    def examined_by(self, check: str) -> Iterator[None]:
        """While the check of this identifier runs: its tolerances hold."""
        self._check = check
        try:
            yield
        finally:
            self._check = ""

    def before(self, name: str) -> float | None:
        """A number of the check that runs, in the baseline."""
        return self.baseline.get(self._check, {}).get(name)

    def tolerance(self, usual: float) -> float:
        """Largest acceptable error in the check that runs: the usual, or the profile's."""
        factors = [t.factor for t in self.profile.tolerances if matching(self._check, t.checks)]
        return usual * prod(factors)

    @contextmanager
    def open(self, **settings: Any) -> Iterator[Opened]:
        """A start of its own, given back at the end.

        Args:
            **settings: Fields of ``EngineConfig``.
        """
        opened = self._open(EngineConfig(backend=self.name, **settings))
        try:
            yield opened
        finally:
            opened.bound.shutdown()

    def keep(self, name: str, make: Callable[[], Kept]) -> Kept:
        """What several checks share because making it takes long; made when first asked for."""
        if name not in self._kept:
            self._kept[name] = make()
        kept: Kept = self._kept[name]
        return kept

    def close(self) -> None:
        """Give the shared activation back, and all that was kept."""
        for kept in self._kept.values():
            if isinstance(kept, Closing):
                kept.close()
        self._kept.clear()
        opened = self.__dict__.pop("opened", None)
        if opened is not None:
            opened.bound.shutdown()

    def _open(self, config: EngineConfig) -> Opened:
        decisions = DecisionLog()
        bound = open_backend(
            self._request, config=config, reference_ops=OPERATIONS, decisions=decisions,
            path=self.path,
        )  # fmt: skip
        return Opened(bound=bound, decisions=decisions)


def process_state() -> dict[str, object]:
    """What is global in the process, and not a backend's to change for good."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "autograd": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


def _problems(profile: object) -> list[str]:
    if not isinstance(profile, ConformanceProfile):
        return [f"it is a {type(profile).__name__}, not a ConformanceProfile"]
    problems = [
        f"the gap '{gap.checks}' lacks its {name}"
        for gap in profile.gaps
        for name in ("reason", "link", "expires")
        if not getattr(gap, name)
    ]
    problems += [f"the gap '{g.checks}' has no day: {g.expires!r}" for g in profile.gaps
                 if g.expires and not _is_day(g.expires)]  # fmt: skip
    problems += [f"the tolerance '{t.checks}' needs a factor above 1 and a reason"
                 for t in profile.tolerances if t.factor <= 1 or not t.reason]  # fmt: skip
    return problems


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
