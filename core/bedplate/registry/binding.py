# SPDX-License-Identifier: Apache-2.0
"""Binding: guarded conversation with the one backend that was selected.

Turns whatever a hook raises into an error that names plugin, hook and request, checks what
hooks return, and gives everything back exactly once.
"""

from __future__ import annotations

__all__ = ["Binding", "capability_problems"]

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from bedplate.contract.capabilities import BackendCapabilities, DeterminismClass
from bedplate.errors import BackendError, BedplateError
from bedplate.registry.faults import fault
from bedplate.registry.hook_table import HookTable, hook_failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from bedplate.contract.runtime import DeviceRuntime
    from bedplate.registry.records import PluginRecord, Survey

_log = logging.getLogger(__name__)


class Binding:
    """The selected backend while and after it is bound.

    Attributes:
        record: The selected backend.
        survey: All plugins, inspected.
        runtime: The device, once activated.
    """

    def __init__(self, record: PluginRecord, survey: Survey) -> None:
        assert survey.hooks is not None
        self.record = record
        self.survey = survey
        self.runtime: DeviceRuntime | None = None
        self._hooks: HookTable = survey.hooks
        self._explain = self._hooks.implementation(record.key, "bedplate_explain_error")
        self._shutdowns = [
            (other, function)
            for other in survey.records
            if other.status == "loaded"
            and (function := self._hooks.implementation(other.key, "bedplate_shutdown"))
        ]

    def ask(self, hook: str, **arguments: Any) -> Any:
        """Call one hook of the backend through pluggy, before the seal."""
        try:
            return self._hooks.call(self.record.key, hook, **arguments)
        except (Exception, SystemExit) as error:
            raise self._failure(hook, next(iter(arguments.values()), None), error) from error

    def factory(self, hook: str, kind: Any) -> Callable[[Any], Any]:
        """A plain callable for a hook, to be used after the seal.

        Args:
            hook: Name of a hook with one argument.
            kind: What its answer must be, unless ``None``; ``None`` accepts anything.
        """
        function = self._hooks.implementation(self.record.key, hook)
        if function is None:
            return lambda _request: None

        def make(request: Any) -> Any:
            try:
                answer = function(request)
            except (Exception, SystemExit) as error:
                raise self._failure(hook, request, error) from error
            if answer is not None and kind is not None and not isinstance(answer, kind):
                raise self.broken(hook, [f"it gave {type(answer).__name__}"])
            return answer

        return make

    def explain_error(self, error: BaseException) -> str | None:
        """The backend's sentence about a vendor's error; ``None`` when it has none."""
        if self._explain is None:
            return None
        try:
            sentence = self._explain(error)
        except Exception:
            _log.exception("Plugin '%s' raised in explain_error", self.record.name)
            return None
        return sentence if isinstance(sentence, str) else None

    def broken(self, hook: str, problems: list[str]) -> BackendError:
        """The error for an answer that breaks the contract."""
        return fault("HW044", **self.record.facts(), hook=hook, problems="; ".join(problems))

    def shutdown(self) -> None:
        """Give the device back, then tell every loaded plugin, last registered first."""
        runtime, self.runtime = self.runtime, None
        if runtime is not None:
            _guarded(self.record.name, runtime.shutdown)
        while self._shutdowns:
            record, function = self._shutdowns.pop()
            _guarded(record.name, partial(function, None))

    def _failure(self, hook: str, request: object, error: BaseException) -> BedplateError:
        """Our own errors pass as they are: they say what, why and next already."""
        if isinstance(error, BedplateError):
            error.add_note(f"raised by plugin '{self.record.name}' in {hook}")
            return error
        return hook_failure(
            self.record, hook, request, error, explanation=self.explain_error(error),
            torch=self.survey.installed.get("torch", "(none)"),
        )  # fmt: skip


def _guarded(name: str, act: Callable[[], object]) -> None:
    try:
        act()
    except Exception:
        _log.exception("Plugin '%s' raised while shutting down", name)


def capability_problems(capabilities: object, runtime: DeviceRuntime) -> list[str]:
    """What is wrong with the answer of ``bedplate_capabilities``; all of it."""
    if not isinstance(capabilities, BackendCapabilities):
        return [f"it gave {type(capabilities).__name__}, not BackendCapabilities"]
    problems = []
    if capabilities.device_type != runtime.device.type:
        problems.append(
            f"device_type is '{capabilities.device_type}', the runtime's is "
            f"'{runtime.device.type}'"
        )
    names = ("compute_dtypes", "kv_dtypes")
    problems += [f"{name} is empty" for name in names if not getattr(capabilities, name)]
    sizes = capabilities.memory.page_sizes
    if not sizes or any(size < 1 for size in sizes):
        problems.append(f"memory.page_sizes is {sizes}; needs at least one, all above 0")
    if capabilities.memory.index_dtype not in ("int32", "int64"):
        problems.append(f"memory.index_dtype is '{capabilities.memory.index_dtype}'")
    if capabilities.determinism not in get_args(DeterminismClass):
        problems.append(f"determinism is '{capabilities.determinism}'")
    if capabilities.graph.default and not capabilities.graph.supported:
        problems.append("graph.default without graph.supported")
    return problems
