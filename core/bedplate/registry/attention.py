# SPDX-License-Identifier: Apache-2.0
"""AttentionProviders: which attention implementation serves a model.

Providers are registered while binding; the runner chooses once it knows the model's calls.
"""

from __future__ import annotations

__all__ = ["AttentionProviders"]

from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from bedplate.contract.attention import AttentionProvider
from bedplate.contract.decisions import Candidate, Decision
from bedplate.errors import BackendError, ContractError
from bedplate.registry.faults import fault
from bedplate.registry.records import nearest
from bedplate.registry.support import ask_support, promises, refusing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bedplate.contract.attention import AttentionRequest
    from bedplate.contract.capabilities import DeterminismClass
    from bedplate.contract.decisions import Support
    from bedplate.registry.decisions import DecisionLog

Mode = Literal["all", "decode", "extend"]


class AttentionProviders:
    """Attention implementations on one backend.

    Args:
        decisions: Receives one decision per choice.
        backend: Name of the backend, for messages.
    """

    def __init__(self, decisions: DecisionLog, backend: str) -> None:
        self._decisions = decisions
        self._backend = backend
        self._providers: list[AttentionProvider] = []
        self._overrides: set[str] = set()
        self._withdrawn: dict[str, str] = {}

    def register(self, provider: AttentionProvider, *, override: bool = False) -> None:
        """Add one implementation.

        Args:
            provider: What is offered.
            override: Whether an override pack offers it, for a backend that is not its own.

        Raises:
            ContractError: It is no ``AttentionProvider``, or its name is taken.
        """
        if not isinstance(provider, AttentionProvider):
            kind = type(provider).__name__
            raise ContractError(f"Attention must be offered as AttentionProvider, not {kind}.")
        if any(rival.name == provider.name for rival in self._providers):
            raise ContractError(
                f"Plugin '{provider.provider}' registers attention '{provider.name}', which "
                "is registered already. Give it another name."
            )
        self._providers.append(provider)
        if override:
            self._overrides.add(provider.name)

    def is_override(self, provider: AttentionProvider) -> bool:
        """Whether an override pack brought it."""
        return provider.name in self._overrides

    def withdraw(self, provider: AttentionProvider, reason: str) -> None:
        """From now on ``provider`` is not chosen."""
        self._withdrawn[provider.name] = reason

    def next_best(
        self, request: AttentionRequest, provider: AttentionProvider
    ) -> AttentionProvider | None:
        """What would serve ``request`` without ``provider``; records nothing."""
        ranked = [p for p in self._ranked() if p is not provider and p.modes == "all"]
        chosen, _ = ask_support(self._questions(ranked, request), request)
        return None if chosen is None else ranked[chosen]

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Forget what was registered inside, if the block raises."""
        before, overrides = list(self._providers), set(self._overrides)
        try:
            yield
        except BaseException:
            self._providers, self._overrides = before, overrides
            raise

    def choose_attention(
        self, request: AttentionRequest, name: str | None = None, *, mode: Mode = "all"
    ) -> AttentionProvider:
        """The implementation to build; records the decision ``attention``.

        Args:
            request: All calls of the model, dtypes and page size.
            name: The one that was asked for; never replaced by another.
            mode: What it must be able to do; ``all`` providers serve every mode.

        Raises:
            UnsupportedError: None fits, or the named one does not (HW060), reasons included.
        """
        point = "attention" if mode == "all" else f"attention.{mode}"
        with self._decisions.choosing(point) as decide:
            ranked = self._ranked()
            fitting = [p for p in ranked if p.modes in ("all", mode)]
            asked = [p for p in fitting if name in (None, p.name)]
            chosen, verdicts = ask_support(self._questions(asked, request), request)
            rest = tuple(
                self._passed_over(p, fitting, name, mode) for p in ranked if p not in asked
            )
            winner = None if chosen is None else asked[chosen]
            decide(
                Decision(
                    point=point,
                    chosen=winner.name if winner else None,
                    candidates=verdicts + rest,
                    detail=_detail(request),
                )
            )
        if winner is None:
            raise self._nothing_fits(request, name, verdicts + rest)
        return winner

    def _ranked(self) -> list[AttentionProvider]:
        return sorted(self._providers, key=lambda p: (-p.priority, p.name))

    def _questions(
        self, asked: list[AttentionProvider], request: AttentionRequest
    ) -> list[tuple[str, Callable[[AttentionRequest], Support]]]:
        wanted: DeterminismClass = "batch_invariant" if request.deterministic else "none"
        return [
            (
                p.name,
                refusing(self._withdrawn[p.name])
                if p.name in self._withdrawn
                else promises(p.supports, p.determinism, wanted),
            )
            for p in asked
        ]

    def __iter__(self) -> Iterator[AttentionProvider]:
        return iter(tuple(self._providers))

    def __len__(self) -> int:
        return len(self._providers)

    @staticmethod
    def _passed_over(
        provider: AttentionProvider,
        fitting: list[AttentionProvider],
        name: str | None,
        mode: Mode,
    ) -> Candidate:
        reason = (
            f"'{name}' was asked for"
            if provider in fitting
            else f"serves {provider.modes} only"
        )
        return Candidate(name=provider.name, verdict="refused", reason=reason)

    def _nothing_fits(
        self, request: AttentionRequest, name: str | None, candidates: tuple[Candidate, ...]
    ) -> BackendError:
        names = [provider.name for provider in self._providers]
        if name is None or name in names:
            reasons = "; ".join(
                f"{c.name}: {c.reason}" for c in candidates if name in (None, c.name)
            )
        else:
            reasons = f"there is none of that name; known: {', '.join(names) or 'none'}"
            reasons += nearest(name, names).rstrip("?").replace(" Did", "; did")
        what = f"attention '{name}'" if name else "attention"
        detail = ", ".join(f"{key} {value}" for key, value in _detail(request).items())
        remedy = "Leave `--attention` out, or change dtype, `--kv-dtype` or page size."
        return fault(
            "HW060", what=f"{what} ({detail})", backend=self._backend, remedy=remedy,
            reasons=reasons or "no attention is registered",
        )  # fmt: skip


def _detail(request: AttentionRequest) -> dict[str, str]:
    sizes = sorted({(call.head_dim, call.value_dim) for call in request.calls})
    return {
        "dtype": request.dtype,
        "kv_dtype": request.kv_dtype,
        "page_size": str(request.page_size),
        "head_sizes": ", ".join(f"{d}/{v}" for d, v in sizes) or "none",
    }
