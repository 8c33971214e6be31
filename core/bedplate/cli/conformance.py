# SPDX-License-Identifier: Apache-2.0
"""``bedplate conformance``: whether a backend is right, level by level.

The kit runs in a process of its own, under pytest: nothing in the core imports it.
"""

from __future__ import annotations

__all__ = ["command"]

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from bedplate.errors import BackendError, ConfigError

_NEEDED = ("pytest", "hypothesis")


@click.command("conformance")
@click.option("--backend", required=True, help="The backend to examine: NAME or NAME:INDEX.")
@click.option("--level", default="0-8", show_default=True, help="2, 0-4, or 2,3.")
@click.option("--only", multiple=True, help="Pattern over checks, such as 'L2/linear/*'.")
@click.option("--report", type=click.Path(path_type=Path), help="Write every result (JSON).")
@click.option("--strict", is_flag=True, help="What works without being declared fails, too.")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="An earlier report; ratios of level 7 may not grow beyond it.",
)
@click.option(
    "--ops-trace",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Also replay operations that `bedplate trace-ops` recorded.",
)
@click.option(
    "--use",
    type=click.Choice(["test", "time", "support", "list"]),
    default="test",
    show_default=True,
    help="The same cases: tested, timed, only asked for, or listed.",
)
@click.option("-v", "--verbose", is_flag=True, help="One line a check.")
def command(
    *, backend: str, level: str, only: tuple[str, ...], report: Path | None, strict: bool,
    baseline: Path | None, ops_trace: Path | None, use: str, verbose: bool,
) -> None:  # fmt: skip
    """Examine a backend; exit status 1 if something that it declares does not work.

    Results: passed, failed, not declared, known gap (in the backend's profile, with reason,
    link and last day), surplus (works without being declared).

    \b
    Examples:
      bedplate conformance --backend cpu
      bedplate conformance --backend cpu --level 2 --only 'L2/rms_norm/*' -v
      bedplate conformance --backend cpu --report conformance.json
      bedplate conformance --backend cpu --use support
    """  # noqa: D301 - click reads the control character
    _require_tools()
    if use != "test":
        module = [sys.executable, "-m", "bedplate.conformance.uses", use, backend, level]
        sys.exit(subprocess.run([*module, *only], check=False).returncode)
    # No configuration of the folder that we happen to stand in: same run everywhere.
    arguments = [
        "-p", "bedplate.conformance.plugin", "-p", "no:cacheprovider", "-c", os.devnull,
        "--import-mode=importlib", "-W", "default", "-v" if verbose else "-q", "--tb=no",
        "--no-header", "-rN", "--noconftest", "--pyargs", "bedplate.conformance",
        "--backend", backend, "--level", level,
    ]  # fmt: skip
    for pattern in only:
        arguments += ["--only", pattern]
    paths = {"--report": report, "--baseline": baseline, "--ops-trace": ops_trace}
    for option, path in paths.items():
        if path is not None:
            arguments += [option, str(path.absolute())]
    if strict:
        arguments.append("--fail-surplus")
    with TemporaryDirectory(prefix="bedplate-conformance-") as folder:
        running = Path(folder) / "running"
        arguments += ["--running", str(running)]
        status = subprocess.run([sys.executable, "-m", "pytest", *arguments]).returncode
        if status < 0:
            raise _brought_down(-status, running, backend)
    sys.exit(status)


def _brought_down(number: int, running: Path, backend: str) -> BackendError:
    check = running.read_text(encoding="utf-8") if running.is_file() else "no check"
    return BackendError(
        f"The process ended by signal {number} in {check}. Code of '{backend}' ended it, "
        "most often by reading memory that supports() should have refused. Run that check "
        f"alone: `bedplate conformance --backend {backend} --only '{check}'`",
        check=check,
    )


def _require_tools() -> None:
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"The conformance kit needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed. Run: "
            "`pip install 'bedplate[conformance]'`"
        )
