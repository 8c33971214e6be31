# SPDX-License-Identifier: Apache-2.0
"""The stages in order: what runner start-up and the command line call."""

from __future__ import annotations

__all__ = ["backend_request", "explain_backend", "open_backend", "survey"]

from typing import TYPE_CHECKING, Any

from bedplate import env
from bedplate.registry.bind import BindRequest, BoundBackend, bind_backend
from bedplate.registry.enumerate import enumerate_plugins
from bedplate.registry.inspect import inspect_plugins
from bedplate.registry.probe import probe_backends
from bedplate.registry.select import (
    BackendRequest,
    Selection,
    parse_request,
    select_backend,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bedplate.config import EngineConfig
    from bedplate.env import PluginFilter
    from bedplate.registry.decisions import DecisionLog
    from bedplate.registry.records import Survey


def backend_request(config: EngineConfig) -> BackendRequest:
    """Which backend is asked for: the configuration's, else ``BEDPLATE_BACKEND``, else auto."""
    if config.backend is not None:
        return BackendRequest(text=config.backend, source=config.source("backend"))
    text = env.BACKEND.get()
    return BackendRequest(text=text, source=env.BACKEND.name) if text else BackendRequest()


def survey(
    *,
    path: Sequence[str] | None = None,
    probe: bool = True,
    allowed: PluginFilter | None = None,
) -> Survey:
    """Stages 1–3 for everything installed.

    Args:
        path: Folders to search for metadata; ``sys.path`` when not given.
        probe: Whether to ask all backends if they could run here.
        allowed: Which plugins may load; as ``BEDPLATE_PLUGINS`` says when not given.

    Raises:
        ConfigError: ``BEDPLATE_PLUGINS`` cannot be read.
    """
    found = inspect_plugins(enumerate_plugins(allowed or env.PLUGINS.get(), path=path))
    return probe_backends(found, env.environment()) if probe else found


def explain_backend(
    request: BackendRequest,
    decisions: DecisionLog,
    *,
    path: Sequence[str] | None = None,
    allowed: PluginFilter | None = None,
) -> tuple[Selection, Survey]:
    """Stages 1–4: which backend would run; records the decision, raises nothing it found.

    Backends that a request does not name are not probed, unless the request cannot be served
    and the message should say what can.
    """
    with decisions.choosing("backend") as decide:
        names = [wanted.name for wanted in parse_request(request)]
        found = survey(path=path, probe=not names, allowed=allowed)
        found = probe_backends(found, env.environment(), names=names or None)
        selection = select_backend(request, found)
        if selection.error is not None:
            found = probe_backends(found, env.environment())
            selection = select_backend(request, found)
        decide(selection.decision)
    return selection, found


def open_backend(
    request: BackendRequest | None = None,
    *,
    config: EngineConfig,
    reference_ops: Mapping[str, Callable[..., Any]],
    decisions: DecisionLog,
    rank: int = 0,
    world_size: int = 1,
    path: Sequence[str] | None = None,
    allowed: PluginFilter | None = None,
) -> BoundBackend:
    """All five stages.

    Args:
        request: What is asked for; from ``config`` and environment when not given.
        config: The user's configuration; the result's ``config`` has the proposals merged.
        reference_ops: ``bedplate.reference.ops.OPERATIONS``.
        decisions: Receives every choice, also when an error is raised.
        rank: This process's number.
        world_size: Processes that serve one model.
        path: Folders to search for metadata; ``sys.path`` when not given.
        allowed: As in ``survey``.

    Raises:
        ConfigError: Request or environment cannot be read.
        BackendError: Nothing may be chosen, or what was chosen fails; see ``faults``.
    """
    selection, found = explain_backend(
        request or backend_request(config), decisions, path=path, allowed=allowed
    )
    if selection.error is not None:
        raise selection.error
    assert selection.record is not None
    return bind_backend(
        BindRequest(
            record=selection.record,
            device_index=selection.device_index,
            config=config,
            reference_ops=reference_ops,
            decisions=decisions,
            environment=env.environment(),
            rank=rank,
            world_size=world_size,
        ),
        found,
    )
