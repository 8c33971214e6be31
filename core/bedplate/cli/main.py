# SPDX-License-Identifier: Apache-2.0
"""The command ``bedplate``: a group whose commands are imported when they are called.

``bedplate --help`` must stay under 150 ms, so names and one-line helps are listed here and
nothing heavy is imported.
"""

from __future__ import annotations

__all__ = ["cli", "main"]

import sys
from importlib import import_module
from types import MappingProxyType

import click

from bedplate import __version__, env
from bedplate.errors import BedplateError, ConfigError

COMMANDS = MappingProxyType(
    {
        "backends": ("bedplate.cli.backends", "What is here, what is not, and why."),
        "bisect-kernels": ("bedplate.cli.bisect_kernels", "Which kernel makes a check fail."),
        "conformance": ("bedplate.cli.conformance", "Examine a backend, level by level."),
        "doctor": ("bedplate.cli.doctor", "Examine this installation and machine."),
        "explain": ("bedplate.cli.explain", "Every choice of a start-up, with its candidates."),
        "generate": ("bedplate.cli.generate", "Generate text from prompts."),
        "new-backend": ("bedplate.cli.new_backend", "Write a backend of your own, complete."),
        "trace-ops": ("bedplate.cli.trace_ops", "Which operations a run calls, as a file."),
    }
)


class LazyGroup(click.Group):
    """Knows its commands by name and sentence; imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself; imports its module."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in ``--help``, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="bedplate")
@click.option("--no-plugins", is_flag=True, help="Safe mode: only bedplate's own plugins.")
def cli(*, no_plugins: bool) -> None:
    """LLM inference on a core that knows no device, and backends bolted on from outside.

    \b
    Examples:
      bedplate backends
      bedplate generate -p "What is 12 + 30?"
      bedplate --no-plugins doctor --json
    """  # noqa: D301 - click reads the control character
    if no_plugins:
        env.set_plugins("none")


def main() -> None:
    """Entry point of the script; turns errors into one message and an exit status.

    Tracebacks are shown with ``BEDPLATE_DEBUG=1``.
    """
    try:
        cli(prog_name="bedplate")
    except BedplateError as error:
        if _debug():
            raise
        click.echo(f"bedplate: {error}", err=True)
        sys.exit(error.exit_status)


def _debug() -> bool:
    try:
        return env.DEBUG.get()
    except ConfigError:
        return False  # the error at hand is the one to show
