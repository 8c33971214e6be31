# SPDX-License-Identifier: Apache-2.0
"""One injection per fault of the registry's table: what to break, and where the error shows."""

from __future__ import annotations

__all__ = ["INJECTIONS"]

import sys
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from bedplate.config import EngineConfig
from bedplate.contract.ops import OpRequest
from bedplate.contract.version import API_VERSION
from bedplate.env import PLUGINS
from bedplate.errors import BackendError
from bedplate.reference.ops import OPERATIONS
from bedplate.registry import DecisionLog
from bedplate.registry.bind import BindRequest, BoundBackend, bind_backend
from bedplate.registry.enumerate import enumerate_plugins
from bedplate.registry.select import BackendRequest, select_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bedplate.registry.records import Survey
    from bedplate.testing.fake_plugins import FakePlugins


def _chosen(found: Survey, text: str) -> BackendError | None:
    return select_backend(BackendRequest(text=text, source="a fault"), found).error


def _record_error(fakes: FakePlugins, **facts: Any) -> BackendError | None:
    """The error of the record of one fake backend."""
    fakes.backend("acme", **facts)
    record = fakes.probed(limit_s=0.2).backend("acme")
    assert record is not None
    return record.error


def _warning(found: Survey) -> BackendError | None:
    record = found.backend("acme")
    assert record is not None
    return record.warnings[0] if record.warnings else None


def _bound(fakes: FakePlugins, **facts: Any) -> tuple[BoundBackend, Survey]:
    fakes.backend("acme", **facts)
    found = fakes.probed()
    record = found.backend("acme")
    assert record is not None
    request = BindRequest(
        record=record, device_index=0, config=EngineConfig(), reference_ops=OPERATIONS,
        decisions=DecisionLog(), environment={},
    )  # fmt: skip
    return bind_backend(request, found), found


def _raised(act: Callable[[], object]) -> BackendError | None:
    try:
        act()
    except BackendError as error:
        return error
    return None


def _metadata(fakes: FakePlugins, filtered: str = "") -> BackendError | None:
    """The first error or finding of enumeration alone."""
    allowed = PLUGINS.get({PLUGINS.name: filtered}) if filtered else None
    found = enumerate_plugins(allowed, path=fakes.path)
    return next((item.error for item in found.diagnoses), None)


def _two_providers(fakes: FakePlugins) -> BackendError | None:
    fakes.distribution("bedplate-a", entries="[bedplate.backends]\nacme = m:x")
    fakes.distribution("bedplate-b", entries="[bedplate.backends]\nacme = m:x")
    return _metadata(fakes)


def _reserved(fakes: FakePlugins) -> BackendError | None:
    fakes.home("[bedplate.backends]\nhost = m:x")
    fakes.distribution("thief", entries="[bedplate.backends]\nhost = m:x")
    return _metadata(fakes)


def _shadowed(fakes: FakePlugins) -> BackendError | None:
    old = fakes.root / "old"
    fakes.distribution("bedplate", version="0.0.1", root=old)
    fakes.home()
    found = enumerate_plugins(path=[str(old), *fakes.path])
    return next((item.error for item in found.diagnoses), None)


def _allowed_but_absent(fakes: FakePlugins) -> BackendError | None:
    fakes.home()
    return _metadata(fakes, "nobody")


def _malformed(fakes: FakePlugins) -> BackendError | None:
    fakes.distribution("odd", entries="[bedplate.backends]\nBad-Name = m:x")
    return _metadata(fakes)


def _blocked(fakes: FakePlugins) -> BackendError | None:
    fakes.backend("acme")
    return _metadata(fakes, "-acme")


def _unknown(fakes: FakePlugins) -> BackendError | None:
    fakes.backend("acme")
    return _chosen(fakes.probed(), "acmee")


def _promised(fakes: FakePlugins) -> BackendError | None:
    fakes.home(extras=("future",))
    return _chosen(fakes.probed(), "future")


def _none_fits(fakes: FakePlugins) -> BackendError | None:
    fakes.backend("acme", probe="score=0, reasons=('no node',)")
    return _chosen(fakes.probed(), "auto")


def _present_but_dead(fakes: FakePlugins) -> BackendError | None:
    fakes.backend("acme", probe="score=0, reasons=('no driver',), present=True")
    return _chosen(fakes.probed(), "auto")


def _no_such_device(fakes: FakePlugins) -> BackendError | None:
    fakes.backend("acme", probe="score=50, devices=(DeviceFacts(index=0, name='d'),)")
    return _chosen(fakes.probed(), "acme:7")


def _heavy(fakes: FakePlugins) -> BackendError | None:
    fakes.backend("acme", code="import time\ntime.sleep(1.05)\n" + _SMALL)
    return _warning(fakes.inspected())


@contextmanager
def _pretended_torch(state: dict[str, bool]) -> Iterator[None]:
    """A torch whose device context exists when ``state`` says so."""
    real = sys.modules.get("torch")
    sys.modules["torch"] = SimpleNamespace(  # type: ignore[assignment]
        accelerator=SimpleNamespace(current_accelerator=lambda: SimpleNamespace(type="x")),
        get_device_module=lambda _name: SimpleNamespace(is_initialized=lambda: state["on"]),
    )
    sys.modules["fake_state"] = SimpleNamespace(state=state)  # type: ignore[assignment]
    try:
        yield
    finally:
        if real is None:
            del sys.modules["torch"]
        else:
            sys.modules["torch"] = real


def _early_context(fakes: FakePlugins) -> BackendError | None:
    fakes.backend(
        "acme",
        extra="""
        @hookimpl
        def bedplate_probe(self):
            import fake_state
            fake_state.state["on"] = True
            return ProbeResult(score=50)
        """,
    )
    with _pretended_torch({"on": False}):
        return _warning(fakes.probed())


def _after_sealing(fakes: FakePlugins) -> BackendError | None:
    _, found = _bound(fakes)
    hooks = found.hooks
    assert hooks is not None
    return _raised(lambda: hooks.call("backend:acme", "bedplate_environment_report"))


def _ambiguous(fakes: FakePlugins) -> BackendError | None:
    fakes.backend("acme", probe="score=800")
    fakes.backend("other", probe="score=800")
    return _chosen(fakes.probed(), "auto")


def _downgrade(fakes: FakePlugins) -> BackendError | None:
    fakes.backend("acme", probe="score=0, reasons=('no driver',), present=True")
    fakes.backend("host", probe="score=50")
    return _chosen(fakes.probed(), "auto")


def _unsupported(fakes: FakePlugins) -> BackendError | None:
    bound, _ = _bound(fakes)
    return _raised(lambda: bound.ops.choose(OpRequest(op="levitate", dtype="float32")))


_SMALL = """
from bedplate.contract import *
class B:
    @hookimpl
    def bedplate_manifest(self): return BackendManifest(name="acme")
    @hookimpl
    def bedplate_probe(self): return ProbeResult(score=50)
    @hookimpl
    def bedplate_activate(self): ...
    @hookimpl
    def bedplate_capabilities(self): ...
backend = B()
"""
_NEWER = f"api=ApiRange(needs=({API_VERSION[0]}, {API_VERSION[1] + 1}))"


def _probing(code: str) -> dict[str, str]:
    return {"extra": f"@hookimpl\ndef bedplate_probe(self): {code}"}


INJECTIONS: Final[Mapping[str, tuple[str, Callable[[FakePlugins], BackendError | None]]]] = (
    MappingProxyType({
        "unknown_name": ("HW001", _unknown),
        "missing_requirement": (
            "HW002", lambda fakes: _record_error(fakes, manifest="requires=('absent-x',)")
        ),
        "present_but_unusable": ("HW003", _present_but_dead),
        "promised_by_an_extra": ("HW004", _promised),
        "blocked": ("HW005", _blocked),
        "nothing_fits": ("HW006", _none_fits),
        "no_such_device": ("HW007", _no_such_device),
        "driver_hidden": (
            "HW010", lambda fakes: _record_error(fakes, probe="score=0, reasons=('no driver',)")
        ),
        "wrong_torch": (
            "HW011", lambda fakes: _record_error(
                fakes, probe="score=0, reasons=('other build',), code='HW011'"
            )
        ),
        "device_too_old": (
            "HW012", lambda fakes: _record_error(
                fakes, probe="score=0, reasons=('old',), code='HW012'"
            )
        ),
        "newer_api": ("HW020", lambda fakes: _record_error(fakes, manifest=_NEWER)),
        "broken_symbol": (
            "HW021", lambda fakes: _record_error(
                fakes, code="raise ImportError('x.so: undefined symbol: _Z1f')"
            )
        ),
        "broken_symbol_in_probe": (
            "HW021", lambda fakes: _record_error(
                fakes, **_probing("raise OSError('undefined symbol: f')")
            )
        ),
        "two_providers": ("HW030", _two_providers),
        "reserved_name": ("HW031", _reserved),
        "shadowed_metadata": ("HW032", _shadowed),
        "allowed_but_absent": ("HW033", _allowed_but_absent),
        "malformed_entry_point": ("HW034", _malformed),
        "no_plugin": ("HW035", lambda fakes: _record_error(fakes, code="backend = object()")),
        "misspelled_hook": (
            "HW036", lambda fakes: _record_error(
                fakes, extra="@hookimpl\ndef bedplate_activat(self): ..."
            )
        ),
        "wrapping_hook": (
            "HW036", lambda fakes: _record_error(
                fakes, extra="@hookimpl(wrapper=True)\ndef bedplate_compile(self): yield"
            )
        ),
        "raises_at_import": ("HW040", lambda fakes: _record_error(fakes, code="1 / 0")),
        "raises_in_probe": ("HW041", lambda fakes: _record_error(fakes, **_probing("1 / 0"))),
        "probe_hangs": (
            "HW041", lambda fakes: _record_error(
                fakes, **_probing("import time; time.sleep(1)")
            )
        ),
        "heavy_import": ("HW042", _heavy),
        "early_context": ("HW043", _early_context),
        "wrong_answer": ("HW044", lambda fakes: _record_error(fakes, **_probing("return 5"))),
        "hook_after_sealing": ("HW045", _after_sealing),
        "ambiguous": ("HW050", _ambiguous),
        "silent_downgrade": ("HW051", _downgrade),
        "unsupported_operation": ("HW060", _unsupported),
    })
)  # fmt: skip
"""Name → code that it must end in, and the injection."""
