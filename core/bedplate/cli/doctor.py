# SPDX-License-Identifier: Apache-2.0
"""``bedplate doctor``: environment, plugins and their own reports, with remedies."""

from __future__ import annotations

__all__ = ["command"]

import platform
import sys
from typing import TYPE_CHECKING

import click
import psutil

from bedplate import env
from bedplate.cli.tables import format_table, print_json
from bedplate.contract.manifest import ReportItem
from bedplate.registry import survey
from bedplate.registry.hook_table import cause_of
from bedplate.registry.select import BackendRequest, select_backend

if TYPE_CHECKING:
    from bedplate.registry.records import Diagnosis, PluginRecord, Survey


@click.command("doctor")
@click.option("--backend", help="Look at this backend only, and demand that it can run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(*, backend: str | None, as_json: bool) -> None:
    """Examine this installation and machine; exit status 1 if something is bad.

    A backend that merely has no device here is not bad, unless named by --backend.

    \b
    JSON: {"ok": true, "items": [{"section", "name", "value", "status": "ok|warn|bad",
    "remedy"}]}

    \b
    Examples:
      bedplate doctor
      bedplate doctor --backend cpu --json
    """  # noqa: D301 - click reads the control character
    found = survey()
    items = [("environment", item) for item in _environment(found)]
    items += [("plugins", item) for item in _plugins(found, backend)]
    for record in found.records:
        if record.status == "loaded" and backend in (None, record.name):
            items += [(record.name, item) for item in _report(record, found)]
    fine = all(item.status != "bad" for _section, item in items)
    _print(items, fine=fine, as_json=as_json)
    sys.exit(0 if fine else 1)


def _environment(found: Survey) -> list[ReportItem]:
    memory = psutil.virtual_memory()
    gib = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    items = [
        ReportItem(name="python", value=platform.python_version()),
        ReportItem(name="platform", value=platform.platform()),
        ReportItem(name="memory", value=gib),
    ]
    items += [_version(found, name) for name in ("bedplate", "torch", "transformers")]
    remedy = f"The core knows: {', '.join(env.VARIABLES)}; a plugin may read others."
    return items + [
        ReportItem(name=name, value="unknown to the core", status="warn", remedy=remedy)
        for name in env.unknown_variables()
    ]


def _version(found: Survey, name: str) -> ReportItem:
    version = found.installed.get(name)
    if version is not None:
        return ReportItem(name=name, value=version)
    remedy = f"Run: pip install {name}"
    return ReportItem(name=name, value="not installed", status="bad", remedy=remedy)


def _plugins(found: Survey, backend: str | None) -> list[ReportItem]:
    items = [
        ReportItem(name=record.key, value=f"{record.distribution} {record.version}: usable")
        for record in found.records
        if record.usable and backend in (None, record.name)
    ]
    asked = None
    if backend is not None:
        asked = select_backend(BackendRequest(text=backend, source="--backend"), found).error
        if asked is not None:
            items.append(
                ReportItem(name=backend, value=asked.code, status="bad", remedy=asked.message)
            )
    wanted = [
        item for item in found.diagnoses if backend is None or item.plugin in ("", backend)
    ]
    return items + [_finding(item) for item in wanted if item.error is not asked]


def _finding(item: Diagnosis) -> ReportItem:
    return ReportItem(
        name=item.plugin or "installation",
        value=item.error.code,
        status="ok" if item.severity == "note" else item.severity,
        remedy=item.error.message,
    )


def _report(record: PluginRecord, found: Survey) -> list[ReportItem]:
    """A plugin's own lines; a report that raises is a bad line."""
    assert found.hooks is not None
    try:
        answer = found.hooks.call(record.key, "bedplate_environment_report")
        return [item for item in answer or () if isinstance(item, ReportItem)]
    except Exception as error:
        remedy = f"Report it to the authors of {record.distribution}."
        return [
            ReportItem(
                name="bedplate_environment_report", value=cause_of(error), status="bad",
                remedy=remedy,
            )
        ]  # fmt: skip


def _print(items: list[tuple[str, ReportItem]], *, fine: bool, as_json: bool) -> None:
    if as_json:
        lines = [
            {
                "section": section,
                "name": item.name,
                "value": item.value,
                "status": item.status,
                "remedy": item.remedy,
            }
            for section, item in items
        ]
        print_json({"ok": fine, "items": lines})
        return
    rows = [[section, item.name, item.status, item.value] for section, item in items]
    click.echo(format_table(["section", "name", "status", "value"], rows))
    for section, item in items:
        if item.remedy:
            click.echo(f"\n{item.status}: {section}, {item.name}: {item.remedy}")
