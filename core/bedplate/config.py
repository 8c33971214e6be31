# SPDX-License-Identifier: Apache-2.0
"""EngineConfig: every setting of an engine, validated, with where each value came from.

Frozen: a backend may *propose* other values for settings that nobody gave
(``registry.configure``), and gets a new record; nothing edits one.  Values come from, in this
order: arguments (or command-line options), environment, the configuration file, defaults.

The configuration file is TOML with one key per setting and one table per backend::

    backend = "auto"
    page_size = 16
    [backend_options.cpu]
    threads = 8

It is read only when it is named, by ``--config`` or ``BEDPLATE_CONFIG``: a file that happens
to lie in the working folder never changes what runs.
"""

from __future__ import annotations

__all__ = ["EngineConfig", "load_config_file", "resolve_config", "setting_names"]

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from bedplate import env
from bedplate.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. ``None`` and ``"auto"`` mean: chosen at start-up, explained.

    Attributes:
        model: Folder of a checkpoint; ``None`` takes the bundled demo model.
        tokenizer: Folder of the tokenizer, when not the model's.
        backend: ``auto``, ``name``, ``name:index`` or an order of preference ``a,b``.
        backend_options: Backend name → that backend's own settings.
        dtype: Name of the torch dtype of weights and activations, or ``auto``.
        kv_dtype: Name of the torch dtype of stored keys and values, or ``auto``.
        page_size: Tokens a page.
        max_context_len: Most tokens one request may hold.
        max_running_requests: Most requests in one pass.
        max_total_tokens: Tokens that the KV pool holds.
        mem_fraction: Share of the free device memory for weights, graphs and KV pool.
        chunked_prefill_tokens: Most new prompt tokens in one pass.
        mixed: Whether running requests get their next token in prefill passes too, instead
            of waiting for the pass after.
        prefix_cache: Whether finished prefixes are kept for requests that share them.
        attention: Name of the attention implementation.
        graphs: Whether passes are recorded and replayed.
        capture_sizes: Request counts to record graphs for, ascending.
        capture_tokens: Numbers of new tokens to record prompt passes for, ascending; those that
            no pass can have are left out; empty for none.
        fusion: How much of a model is replaced by faster forms after proof: ``off`` nothing,
            ``leaf`` sibling linears and norms, ``block`` whole layers where they are known;
            ``compile`` leaves all of it to ``torch.compile``, which takes seconds to minutes.
        load_format: ``auto``, ``safetensors``, or ``dummy`` (random weights from a config).
        overlap: Whether the host plans the next step before this one is done.
        seed: Seed of everything random that a request does not seed itself.
        trust_remote_code: Whether code inside a checkpoint folder may run.
        deterministic: Whether a request has the same bits whatever else is in its passes, in
            any order, with any chunking, recorded or not; slower, and refused where the
            backend cannot promise it.
        shadow: Backend that runs passes a second time, to compare every part of the model.
        shadow_rate: Share of the passes that the shadow looks at.
        debug: Whether invariants are checked while running.
        sources: Setting → where its value came from. Not a setting itself.
    """

    model: str | None = None
    tokenizer: str | None = None
    backend: str | None = None
    backend_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dtype: str = "auto"
    kv_dtype: str = "auto"
    page_size: int | None = None
    max_context_len: int | None = None
    max_running_requests: int | None = None
    max_total_tokens: int | None = None
    mem_fraction: float | None = None
    chunked_prefill_tokens: int = 2048
    mixed: bool = False
    prefix_cache: bool = True
    attention: str | None = None
    graphs: bool | None = None
    capture_sizes: tuple[int, ...] | None = None
    capture_tokens: tuple[int, ...] | None = None
    fusion: Literal["off", "leaf", "block", "compile"] = "block"
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    overlap: bool | None = None
    seed: int = 0
    trust_remote_code: bool = False
    deterministic: bool = False
    shadow: str | None = None
    shadow_rate: float = 1.0
    debug: bool = False
    sources: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        problems = [text for name in setting_names() if (text := self._problem(name))]
        if problems:
            raise ConfigError(
                f"Wrong settings: {'; '.join(problems)}. Correct them and start again.",
                problems=tuple(problems),
            )

    def given(self, name: str) -> bool:
        """Whether somebody set ``name``: to anything but unset, ``auto`` or the default."""
        value = getattr(self, name)
        if value is None or value == "auto":
            return False
        return name in self.sources or value != _default(name)

    def source(self, name: str) -> str:
        """Where the value of ``name`` came from, for decisions."""
        return self.sources.get(name, "argument" if self.given(name) else "default")

    def flat(self) -> dict[str, Any]:
        """Setting → value; ``None`` where nobody gave one. What backends are shown."""
        return {n: getattr(self, n) if self.given(n) else None for n in setting_names()}

    def _problem(self, name: str) -> str | None:
        value = getattr(self, name)
        allowed = _allowed(name, value)
        if allowed is None:
            return None
        where = f" (from {self.sources[name]})" if name in self.sources else ""
        return f"{name} is {value!r}{where}, but must be {allowed}"


def setting_names() -> tuple[str, ...]:
    """Names of all settings, in order of declaration."""
    return tuple(f.name for f in fields(EngineConfig) if f.name != "sources")


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Settings from a TOML file.

    Raises:
        ConfigError: The file cannot be read or parsed, or has keys that are no settings
            (all of them are listed).
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(
            f"Cannot read the configuration file {path}: {error}. "
            "Give the path of a readable TOML file.",
            path=str(path),
        ) from error
    _refuse_unknown(data, f"the configuration file {path}")
    for name in _SIZES:
        if isinstance(data.get(name), list):
            data[name] = tuple(data[name])
    return data


def resolve_config(
    arguments: Mapping[str, Any],
    *,
    options: bool = False,
    path: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> EngineConfig:
    """Merge arguments, environment and file into one record.

    Args:
        arguments: Setting → value; ``None`` means not given.
        options: Whether ``arguments`` are command-line options; names their source
            ``--backend`` instead of ``argument``.
        path: Configuration file; ``BEDPLATE_CONFIG`` when not given.
        environ: Environment to look at, for tests.

    Raises:
        ConfigError: A name or value is wrong; all offenders are listed.
    """
    _refuse_unknown(arguments, "the arguments")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def take(settings: Mapping[str, Any], origin: str | None) -> None:
        for name, value in settings.items():
            if value is not None and name not in values:
                values[name] = value
                sources[name] = origin or "--" + name.replace("_", "-")

    take(arguments, None if options else "argument")
    take({"backend": env.BACKEND.get(environ)}, env.BACKEND.name)
    path = path or env.CONFIG.get(environ)
    if path is not None:
        take(load_config_file(path), str(path))
    return EngineConfig(**values, sources=sources)


def _refuse_unknown(settings: Iterable[str], where: str) -> None:
    known = setting_names()
    unknown = [name for name in settings if name not in known]
    if not unknown:
        return
    hints = []
    for name in unknown:
        near = get_close_matches(name, known, n=1)
        hints.append(f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    raise ConfigError(
        f"Unknown settings in {where}: {', '.join(hints)}. Known: {', '.join(known)}.",
        unknown=tuple(unknown),
    )


def _default(name: str) -> Any:
    spec = next(f for f in fields(EngineConfig) if f.name == name)
    return spec.default if spec.default is not MISSING else {}


_OPTIONAL_TEXT = ("model", "tokenizer", "backend", "attention", "shadow")
_OPTIONAL_COUNTS = (
    "page_size", "max_context_len", "max_running_requests", "max_total_tokens",
)  # fmt: skip
_SWITCHES = ("mixed", "prefix_cache", "trust_remote_code", "deterministic", "debug")
_OPTIONAL_SWITCHES = ("graphs", "overlap")
_SIZES = ("capture_sizes", "capture_tokens")
_CHOICES = {
    "fusion": ("off", "leaf", "block", "compile"),
    "load_format": ("auto", "safetensors", "dummy"),
}


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_sizes(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and all(_is_integer(size) and size > 0 for size in value)
        and list(value) == sorted(set(value))
    )


def _allowed(name: str, value: Any) -> str | None:
    """What ``name`` must be, if ``value`` is not that."""
    rule: tuple[bool, str]
    if name in _OPTIONAL_TEXT:
        rule = (value is None or (isinstance(value, str) and bool(value)), "a text")
    elif name in ("dtype", "kv_dtype"):
        rule = (isinstance(value, str) and value.isidentifier(), "a dtype name or 'auto'")
    elif name in _OPTIONAL_COUNTS:
        rule = (value is None or (_is_integer(value) and value > 0), "an integer above 0")
    elif name in _SWITCHES:
        rule = (isinstance(value, bool), "true or false")
    elif name in _OPTIONAL_SWITCHES:
        rule = (value is None or isinstance(value, bool), "true or false")
    elif name in _CHOICES:
        rule = (value in _CHOICES[name], f"one of {', '.join(_CHOICES[name])}")
    elif name in ("mem_fraction", "shadow_rate"):
        number = isinstance(value, float | int) and not isinstance(value, bool)
        unset = value is None and name == "mem_fraction"
        rule = (unset or (number and 0 < value <= 1), "above 0 and at most 1")
    elif name in _SIZES:
        rule = (value is None or _is_sizes(value), "a tuple of ascending integers above 0")
    elif name == "chunked_prefill_tokens":
        rule = (_is_integer(value) and value > 0, "an integer above 0")
    elif name == "seed":
        rule = (_is_integer(value) and 0 <= value < 2**63, "an integer from 0 to 2**63 - 1")
    else:
        tables = isinstance(value, Mapping) and all(
            isinstance(options, Mapping) for options in value.values()
        )
        rule = (tables, "a table of settings per backend name")
    return None if rule[0] else rule[1]
