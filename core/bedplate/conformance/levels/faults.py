# SPDX-License-Identifier: Apache-2.0
"""L8: every fault of the table ends in its code, and the subject's own hooks may break.

The first half needs no device and no subject; it is here so that the table and the ways into
it cannot part.
"""

from __future__ import annotations

__all__ = ["checks"]

from functools import partial
from typing import TYPE_CHECKING, Any

from bedplate.conformance.cases.faults import INJECTIONS
from bedplate.conformance.check import Check, Wrong, require
from bedplate.conformance.sabotage import Sabotage, implemented
from bedplate.errors import BackendError
from bedplate.registry.faults import FAULTS
from bedplate.testing.fake_plugins import fake_plugins

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bedplate.conformance.subject import Subject

_BINDING = (
    "bedplate_configure", "bedplate_activate", "bedplate_capabilities",
    "bedplate_register_ops", "bedplate_register_attention",
)  # fmt: skip
"""Hooks that are called while binding, in order."""
_FACTORIES = {
    "bedplate_make_kv_pool": "make_kv_pool",
    "bedplate_make_allocator": "make_allocator",
    "bedplate_make_graph_runner": "make_graph_runner",
    "bedplate_compile": "compile",
    "bedplate_after_load": "after_load",
}
"""Hooks that are called after sealing → the bound record's name for them."""


def checks(subject: Subject) -> Iterator[Check]:
    """Injections, then the subject's hooks one by one."""
    for name, (code, inject) in INJECTIONS.items():
        yield Check(level=8, name=f"table/{code}/{name}", run=partial(_inject, code, inject))
    yield Check(level=8, name="table/is_whole", run=_is_whole)
    have = implemented(subject)
    for hook in _BINDING:
        if hook in have:
            for way, act in _WAYS.items():
                run = partial(_broken_binding, hook, way, act)
                yield Check(level=8, name=f"hook/{hook}/{way}", run=run)
    for hook in ("bedplate_activate", "bedplate_capabilities"):
        yield Check(level=8, name=f"hook/{hook}/wrong_answer", run=partial(_wrong_answer, hook))
    for hook, attribute in _FACTORIES.items():
        if hook in have:
            run = partial(_broken_factory, hook, attribute)
            yield Check(level=8, name=f"hook/{hook}/raises", run=run)
    yield Check(level=8, name="opens_after_faults", run=_opens_after_faults)


def _raise(error: BaseException) -> Any:
    raise error


_WAYS: dict[str, Callable[[], Any]] = {
    "raises": lambda: _raise(RuntimeError("injected by the kit")),
    "exits": lambda: _raise(SystemExit(3)),
    "links_badly": lambda: _raise(ImportError("x.so: undefined symbol: injected")),
}
_CODES = {"raises": "HW041", "exits": "HW041", "links_badly": "HW021"}


def _inject(code: str, inject: Callable[[Any], BackendError | None], _subject: Subject) -> None:
    with fake_plugins() as fakes:
        error = inject(fakes)
    require(error is not None, f"nothing is wrong, by its own word, instead of {code}")
    assert error is not None
    require(error.code == code, f"ends in {error.code}, not {code}: {error.message}")
    require("`" in error.message, f"{code} names no command: {error.message}")
    require(str(error).endswith(f"[{code}]"), "the message does not end with its code")


def _is_whole(_subject: Subject) -> None:
    """No fault of the table without an injection."""
    missing = set(FAULTS) - {code for code, _ in INJECTIONS.values()}
    require(not missing, f"nothing triggers {', '.join(sorted(missing))}")


def _broken_binding(hook: str, way: str, act: Callable[[], Any], subject: Subject) -> None:
    """The error names the hook, and what was taken is given back exactly once."""
    broken = Sabotage(subject, hook, act)
    try:
        broken.bind().shutdown()
    except BackendError as error:
        require(error.code == _CODES[way], f"ends in {error.code}, not {_CODES[way]}")
        if way != "links_badly":
            require(hook in error.message, f"the message does not name {hook}")
    else:
        raise Wrong("a hook that fails is ignored")
    require(
        broken.shutdowns == broken.activations,
        f"{broken.activations} activations, {broken.shutdowns} shutdowns after the failure",
    )


def _wrong_answer(hook: str, subject: Subject) -> None:
    broken = Sabotage(subject, hook, lambda: object())
    try:
        broken.bind().shutdown()
    except BackendError as error:
        require(error.code == "HW044", f"ends in {error.code}, not HW044")
    else:
        raise Wrong("an object of no type is accepted as an answer")
    require(broken.shutdowns == broken.activations, "the device is not given back")


def _broken_factory(hook: str, attribute: str, subject: Subject) -> None:
    bound = Sabotage(subject, hook, _WAYS["raises"]).bind()
    try:
        getattr(bound, attribute)("a request")
    except BackendError as error:
        require(error.code == "HW041", f"ends in {error.code}, not HW041")
        require(hook in error.message, f"the message does not name {hook}")
    else:
        raise Wrong("a factory that fails is ignored")
    finally:
        bound.shutdown()


def _opens_after_faults(subject: Subject) -> None:
    """After all of this the backend starts as if nothing had happened."""
    with subject.open() as opened:
        require(opened.bound.name == subject.record.name, "another backend opens")
        require(not opened.decisions.unexplained(), "choices without a record")
