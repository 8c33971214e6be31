# SPDX-License-Identifier: Apache-2.0
"""Operations: which implementation of a named operation serves a request.

Known operations are those with a plain-torch meaning, handed in by the caller (the registry
lies below the reference).  The meaning is always the last candidate.
"""

from __future__ import annotations

__all__ = ["Operations"]

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from bedplate.contract.decisions import Candidate, Decision
from bedplate.contract.ops import OpProvider, OpRegistry, OpRequest
from bedplate.errors import ContractError
from bedplate.registry.faults import fault
from bedplate.registry.records import nearest
from bedplate.registry.support import ask_support, promises, refusing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bedplate.contract.capabilities import DeterminismClass
    from bedplate.contract.decisions import Support
    from bedplate.registry.decisions import DecisionLog

REFERENCE: Final = "reference"


class Operations(OpRegistry):
    """Providers of operations on one backend.

    Args:
        reference: Operation → its plain-torch meaning.
        decisions: Receives one decision per distinct request.
        backend: Name of the backend, for messages.
        determinism: What a provider must promise to be chosen.
    """

    def __init__(
        self,
        reference: Mapping[str, Callable[..., Any]],
        decisions: DecisionLog,
        backend: str,
        determinism: DeterminismClass = "none",
    ) -> None:
        self._determinism = determinism
        self._decisions = decisions
        self._backend = backend
        self._providers: dict[str, list[OpProvider]] = {
            op: [_meaning(op, call)] for op, call in reference.items()
        }
        self._chosen: dict[tuple[object, ...], OpProvider] = {}
        self._withdrawn: dict[tuple[object, ...], dict[str, str]] = {}

    def register(self, provider: OpProvider) -> None:
        """See ``OpRegistry.register``.

        Raises:
            ContractError: Unknown operation, or a second implementation by one provider.
        """
        rivals = self._providers.get(provider.op)
        if rivals is None:
            known = ", ".join(sorted(self._providers))
            raise ContractError(
                f"Provider '{provider.provider}' registers operation '{provider.op}', which "
                f"has no meaning in the reference.{nearest(provider.op, self._providers)} "
                f"Known: {known}. Register one of those."
            )
        if any(rival.provider == provider.provider for rival in rivals):
            raise ContractError(
                f"Provider '{provider.provider}' registers operation '{provider.op}' twice, "
                "or under a name that is taken. Register one implementation that answers "
                "supports() for all of its cases."
            )
        rivals.append(provider)

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Forget what was registered inside, if the block raises."""
        before = {op: list(providers) for op, providers in self._providers.items()}
        try:
            yield
        except BaseException:
            self._providers = before
            raise

    def providers(self, op: str) -> tuple[OpProvider, ...]:
        """Every implementation of an operation, preferred ones first, its meaning last."""
        return tuple(sorted(self._providers.get(op, ()), key=_rank))

    def choose(self, request: OpRequest) -> OpProvider:
        """See ``OpRegistry.choose``. Equal requests are answered from memory.

        Raises:
            UnsupportedError: No provider supports the request (HW060), reasons included.
        """
        identity = _identity(request)
        if identity not in self._chosen:
            self._chosen[identity] = self._choose(request)
        return self._chosen[identity]

    @property
    def has_overrides(self) -> bool:
        """Whether any override pack offers anything."""
        return any(p.kind == "kernels" for rivals in self._providers.values() for p in rivals)

    def withdraw(self, request: OpRequest, provider: OpProvider, reason: str) -> None:
        """From now on ``provider`` is not chosen for requests equal to this one."""
        identity = _identity(request)
        self._withdrawn.setdefault(identity, {})[provider.provider] = reason
        self._chosen.pop(identity, None)

    def next_best(self, request: OpRequest, provider: OpProvider) -> OpProvider:
        """What would serve ``request`` without ``provider``; records nothing.

        Raises:
            UnsupportedError: Nothing would (HW060); the reference supports everything.
        """
        rivals = self.providers(request.op)
        ranked = [rival for rival in rivals if rival.provider != provider.provider]
        chosen, candidates = ask_support(self._questions(ranked, request), request)
        if chosen is None:
            raise self._nothing_fits(request, candidates)
        return ranked[chosen]

    def _questions(
        self, ranked: Sequence[OpProvider], request: OpRequest
    ) -> list[tuple[str, Callable[[OpRequest], Support]]]:
        withdrawn = self._withdrawn.get(_identity(request), {})
        return [
            (
                p.provider,
                refusing(withdrawn[p.provider])
                if p.provider in withdrawn
                else promises(p.supports, p.determinism, self._determinism),
            )
            for p in ranked
        ]

    def _choose(self, request: OpRequest) -> OpProvider:
        with self._decisions.choosing(f"op.{request.op}") as decide:
            ranked = self.providers(request.op)
            asked = self._questions(ranked, request)
            chosen, candidates = ask_support(asked, request)
            decide(
                Decision(
                    point=f"op.{request.op}",
                    chosen=None if chosen is None else ranked[chosen].provider,
                    candidates=candidates,
                    detail={"dtype": request.dtype, **_printed(request.attributes)},
                )
            )
        if chosen is None:
            raise self._nothing_fits(request, candidates)
        return ranked[chosen]

    def _nothing_fits(
        self, request: OpRequest, candidates: tuple[Candidate, ...]
    ) -> BaseException:
        attributes = ", ".join(f"{k}={v}" for k, v in _printed(request.attributes).items())
        reasons = "; ".join(f"{c.name}: {c.reason}" for c in candidates)
        what = f"{request.op}({attributes}) in {request.dtype}"
        return fault(
            "HW060", backend=self._backend, what=what,
            reasons=reasons or f"known operations: {', '.join(sorted(self._providers))}",
            remedy="Ask for another dtype, or install a plugin that offers it.",
        )  # fmt: skip


def _identity(request: OpRequest) -> tuple[object, ...]:
    attributes = repr(sorted(request.attributes.items()))
    return (request.op, request.dtype, request.arch, attributes)


def _meaning(op: str, call: Callable[..., Any]) -> OpProvider:
    return OpProvider(op=op, provider=REFERENCE, call=call, priority=-1, kind="reference")


def _rank(provider: OpProvider) -> tuple[bool, int, str]:
    return (provider.kind == "reference", -provider.priority, provider.provider)


def _printed(attributes: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in attributes.items()}
