# SPDX-License-Identifier: Apache-2.0
"""The subject's own plugin with one hook broken, bound as the core binds it.

The other hooks are the plugin's; the runtime that it gives is watched for its shutdown.
"""

from __future__ import annotations

__all__ = ["Sabotage", "implemented"]

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bedplate import env
from bedplate.config import EngineConfig
from bedplate.contract.hooks import hookimpl
from bedplate.reference.ops import OPERATIONS
from bedplate.registry import DecisionLog
from bedplate.registry.bind import BindRequest, bind_backend
from bedplate.registry.hook_table import HookTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from bedplate.conformance.subject import Subject
    from bedplate.registry.bind import BoundBackend


class Sabotage:
    """One broken plugin.

    Args:
        subject: Whose plugin.
        hook: Which hook is broken; must be implemented.
        act: What it does instead, without arguments.

    Attributes:
        shutdowns: How often the runtime was shut down.
        activations: How often the plugin gave a runtime.
    """

    def __init__(self, subject: Subject, hook: str, act: Callable[[], Any]) -> None:
        self.shutdowns = self.activations = 0
        record = subject.record
        hooks = {name: getattr(record.plugin, name) for name in implemented(subject)}
        hooks["bedplate_activate"] = self._watched(hooks["bedplate_activate"])

        @hookimpl
        def broken() -> Any:
            return act()

        hooks[hook] = broken
        plugin = _Plugin(hooks)
        table = HookTable()
        table.register(record.key, plugin)
        self._survey = replace(
            subject.survey, records=(replace(record, plugin=plugin),), hooks=table
        )
        self._index = subject.bound.device_index

    def bind(self) -> BoundBackend:
        """Bind it, as ``open_backend`` does once a backend is chosen."""
        request = BindRequest(
            record=self._survey.records[0], device_index=self._index, config=EngineConfig(),
            reference_ops=OPERATIONS, decisions=DecisionLog(), environment=env.environment(),
        )  # fmt: skip
        return bind_backend(request, self._survey)

    def _watched(self, activate: Callable[..., Any]) -> Callable[..., Any]:
        @hookimpl
        def watched(request: Any) -> Any:
            runtime = activate(request)
            self.activations += 1
            give_back = runtime.shutdown

            def shutdown() -> None:
                self.shutdowns += 1
                give_back()

            runtime.shutdown = shutdown
            return runtime

        return watched


class _Plugin:
    """Hooks as attributes; hashable, as pluggy wants it."""

    def __init__(self, hooks: dict[str, Any]) -> None:
        vars(self).update(hooks)


def implemented(subject: Subject) -> list[str]:
    """Names of the hooks that the subject's plugin implements."""
    hooks, key = subject.survey.hooks, subject.record.key
    assert hooks is not None
    return sorted(name for name in hooks.names if hooks.implements(key, name))
