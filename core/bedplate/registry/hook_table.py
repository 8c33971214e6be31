# SPDX-License-Identifier: Apache-2.0
"""HookTable: pluggy for the semantics of hooks, with our own loading and a seal.

pluggy checks signatures and lets an implementation take any subset of the arguments.  Its own
loader is not used (it stops at the first broken plugin), nor its ordering: a call here always
names the one plugin that is asked.  After ``seal`` every call through pluggy raises; what the
core keeps are ``implementation`` results, plain callables without pluggy behind them.
"""

from __future__ import annotations

__all__ = ["HookTable", "cause_of", "hook_failure", "links_badly"]

import inspect
import re
import reprlib
from typing import TYPE_CHECKING, Any

import pluggy

from bedplate.contract.hooks import PROJECT, BedplateHooks
from bedplate.registry.faults import fault
from bedplate.registry.records import PluginRecord, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bedplate.errors import BackendError

_PREFIX = f"{PROJECT}_"
_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 200
_LINK_TROUBLE = re.compile(
    r"undefined symbol|symbol not found|DLL load failed|version `\S+' not found", re.IGNORECASE
)


class HookTable:
    """All loaded plugins under their keys; see the module."""

    def __init__(self) -> None:
        self.manager = pluggy.PluginManager(PROJECT)
        self.manager.add_hookspecs(BedplateHooks)
        self.sealed = False

    @property
    def names(self) -> frozenset[str]:
        """Names of all hooks."""
        return frozenset(name for name in vars(self.manager.hook) if name.startswith(_PREFIX))

    def register(self, key: str, plugin: object) -> None:
        """Add a plugin in which ``problems_of`` found nothing."""
        self.manager.register(plugin, name=key)

    def problems_of(self, plugin: object) -> list[str]:
        """What is wrong with the hooks of ``plugin``; looked at before pluggy sees it."""
        problems = []
        for name in dir(plugin):
            if name.startswith(_PREFIX) and inspect.isroutine(getattr(plugin, name)):
                problems += self._problems_of_hook(name, getattr(plugin, name))
        return problems

    def implements(self, key: str, hook: str) -> bool:
        """Whether the plugin implements the hook."""
        return self._find(key, hook) is not None

    def call(self, key: str, hook: str, **arguments: Any) -> Any:
        """Ask one plugin through pluggy.

        Returns:
            Its answer; ``None`` if it does not implement the hook.
        """
        others = [p for name, p in self.manager.list_name_plugin() if name != key and p]
        answer = self.manager.subset_hook_caller(hook, others)(**arguments)
        if isinstance(answer, list) and not _is_firstresult(self.manager, hook):
            return answer[0] if answer else None
        return answer

    def implementation(self, key: str, hook: str) -> Callable[[Any], Any] | None:
        """The plugin's own function for a hook with one argument, free of pluggy."""
        found = self._find(key, hook)
        if found is None:
            return None
        function: Callable[..., Any] = found.function
        return function if found.argnames else lambda _argument: function()

    def seal(self) -> None:
        """From now on every hook call through pluggy raises ``ContractError``."""

        def refuse(name: str, _impls: object, _arguments: Mapping[str, Any]) -> None:
            raise fault("HW045", hook=name)

        self.manager.add_hookcall_monitoring(refuse, lambda *_outcome: None)
        self.sealed = True

    def _problems_of_hook(self, name: str, function: Callable[..., Any]) -> list[str]:
        options = getattr(function, f"{PROJECT}_impl", None)
        if options is None:
            return [f"{name} is not marked with hookimpl"]
        if name not in self.names:
            hint = nearest(name, self.names)
            return [] if options["optionalhook"] else [f"there is no hook '{name}'.{hint}"]
        if options["wrapper"] or options["hookwrapper"]:
            return [f"{name} is a wrapper, which could change answers unseen"]
        known = getattr(self.manager.hook, name).spec.argnames
        strange = [a for a in _wanted_arguments(function) if a not in known]
        has = ", ".join(known) or "none"
        return [f"{name} wants {a}; its arguments are: {has}" for a in strange]

    def _find(self, key: str, hook: str) -> pluggy.HookImpl | None:
        impls = getattr(self.manager.hook, hook).get_hookimpls()
        return next((impl for impl in impls if impl.plugin_name == key), None)


def _wanted_arguments(function: Callable[..., Any]) -> list[str]:
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
    ]


def cause_of(error: BaseException) -> str:
    """Type and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def links_badly(error: BaseException) -> bool:
    """Whether a binary part was built against another library than the installed one."""
    return isinstance(error, ImportError | OSError) and bool(_LINK_TROUBLE.search(str(error)))


def hook_failure(
    record: PluginRecord,
    hook: str,
    request: object,
    error: BaseException,
    *,
    explanation: str | None = None,
    torch: str = "(unknown)",
) -> BackendError:
    """The error that says that ``hook`` of a plugin raised ``error``."""
    if links_badly(error):
        failure = fault("HW021", **record.facts(), torch=torch, cause=cause_of(error))
    else:
        failure = fault(
            "HW041", **record.facts(), hook=hook, cause=cause_of(error),
            request="nothing" if request is None else _SHORT.repr(request),
            explanation=f" {explanation}" if explanation else "",
        )  # fmt: skip
    failure.__cause__ = error
    return failure


def _is_firstresult(manager: pluggy.PluginManager, hook: str) -> bool:
    spec = getattr(manager.hook, hook).spec
    return bool(spec.opts.get("firstresult"))
