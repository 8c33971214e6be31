# SPDX-License-Identifier: Apache-2.0
"""``bedplate backends``: everything that is installed or known, and whether it runs here."""

from __future__ import annotations

__all__ = ["command"]

from typing import TYPE_CHECKING, Any

import click

from bedplate.cli.tables import format_table, print_json
from bedplate.contract.version import API_VERSION
from bedplate.registry import survey
from bedplate.registry.faults import FAULTS

if TYPE_CHECKING:
    from bedplate.registry.records import PluginRecord, Survey

COLUMNS = ("name", "kind", "distribution", "version", "api", "status", "score", "reason")


@click.command("backends")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(*, as_json: bool) -> None:
    """What is here, what is not, and why.

    Status is one of: usable, unusable, refused, failed, absent (known, not in this release).

    \b
    JSON: {"api": "1.0", "plugins": [{"name", "kind", "distribution", "version", "api",
    "status", "score", "code", "reason", "summary", "devices": [{"index", "name", "arch",
    "memory_bytes"}]}], "diagnoses": [{"severity", "code", "plugin", "message"}]}

    \b
    Examples:
      bedplate backends
      bedplate backends --json
    """  # noqa: D301 - click reads the control character
    found = survey()
    rows = [_row(record) for record in found.records] + [_absent(n) for n in found.absent]
    if as_json:
        api = ".".join(map(str, API_VERSION))
        print_json({"api": api, "plugins": rows, "diagnoses": diagnoses_json(found)})
        return
    click.echo(format_table(COLUMNS, [[str(row[name]) for name in COLUMNS] for row in rows]))


def diagnoses_json(found: Survey, plugin: str | None = None) -> list[dict[str, str]]:
    """Diagnoses as JSON objects.

    Args:
        found: The survey.
        plugin: Only those of this plugin and those of no plugin.
    """
    return [
        {
            "severity": item.severity,
            "code": item.error.code,
            "plugin": item.plugin,
            "message": item.error.message,
        }
        for item in found.diagnoses
        if plugin is None or item.plugin in ("", plugin)
    ]


def _row(record: PluginRecord) -> dict[str, Any]:
    status = "usable" if record.usable else "unusable"
    return {
        "name": record.name,
        "kind": record.kind,
        "distribution": record.distribution,
        "version": record.version,
        "api": ".".join(map(str, record.manifest.api.needs)) if record.manifest else "",
        "status": record.status if record.status in ("refused", "failed") else status,
        "score": record.score,
        "code": record.error.code if record.error else "",
        "reason": record.reason,
        "summary": record.manifest.summary if record.manifest else "",
        "devices": [
            {
                "index": device.index,
                "name": device.name,
                "arch": device.arch,
                "memory_bytes": device.memory_bytes,
            }
            for device in (record.probe.devices if record.probe else ())
        ],
    }


def _absent(name: str) -> dict[str, Any]:
    return dict.fromkeys(COLUMNS, "") | {
        "name": name,
        "kind": "backend",
        "status": "absent",
        "score": 0,
        "code": "HW004",
        "reason": FAULTS["HW004"].title.lower(),
        "summary": "",
        "devices": [],
    }
