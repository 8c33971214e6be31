# SPDX-License-Identifier: Apache-2.0
"""``bedplate generate``: prompts in, text out."""

from __future__ import annotations

__all__ = ["command"]

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from bedplate.engine.engine import Engine
    from bedplate.engine.outputs import RequestOutput
    from bedplate.runner.sampling_params import SamplingParams


@click.command("generate")
@click.argument("model", required=False)
@click.option("-p", "--prompt", "prompts", multiple=True, help="A prompt; may be repeated.")
@click.option(
    "-f",
    "--prompt-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="One prompt a line; '-' is not needed: without prompts, standard input is read.",
)
@click.option(
    "--chat/--no-chat",
    default=None,
    help="Wrap each prompt in the chat template. Default: if there is one.",
)
@click.option("--backend", help="auto, NAME, NAME:INDEX or an order of preference such as a,b.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
    help="Configuration file (TOML).",
)
@click.option("--tokenizer", help="Folder of the tokenizer, when not the model's.")
@click.option("--dtype", help="auto, float32, bfloat16, …")
@click.option("--kv-dtype", help="Storage of keys and values.")
@click.option(
    "--load-format",
    type=click.Choice(["auto", "safetensors", "dummy"]),
    help="dummy: random weights from config.json alone.",
)
@click.option("--attention", help="Attention implementation; see `bedplate explain`.")
@click.option(
    "--fusion",
    type=click.Choice(["off", "leaf", "block", "compile"]),
    help="How much of the model is fused, after proof.",
)
@click.option(
    "--deterministic/--no-deterministic",
    default=None,
    help="Same bits for a request whatever else runs; slower.",
)
@click.option("--graphs/--no-graphs", default=None, help="Record and replay decode passes.")
@click.option("--shadow", help="Backend that runs passes again, to compare every part.")
@click.option("--shadow-rate", type=float, help="Share of passes that the shadow looks at.")
@click.option("--page-size", type=int, help="Tokens a page.")
@click.option("--max-total-tokens", type=int, help="Tokens the cache holds.")
@click.option("--max-context-len", type=int, help="Most tokens of one request.")
@click.option("--max-running-requests", type=int, help="Most requests in a pass.")
@click.option(
    "--mem-fraction", type=float, help="Share of free memory for weights, graphs and cache."
)
@click.option(
    "--mixed/--no-mixed",
    default=None,
    help="Give running requests their next token in prefill passes too.",
)
@click.option(
    "--prefix-cache/--no-prefix-cache", default=None, help="Keep prefixes that requests share."
)
@click.option(
    "--trust-remote-code",
    is_flag=True,
    default=None,
    help="Allow code inside the checkpoint to run.",
)
@click.option(
    "-n",
    "--max-tokens",
    type=int,
    default=128,
    show_default=True,
    help="Most new tokens a prompt.",
)
@click.option("--min-tokens", type=int, default=0, help="No end before so many.")
@click.option(
    "-t", "--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."
)
@click.option("--top-k", type=int, default=0, help="0 is off.")
@click.option("--top-p", type=float, default=1.0, help="1 is off.")
@click.option("--min-p", type=float, default=0.0, help="0 is off.")
@click.option("--seed", type=int, help="Same seed, same text.")
@click.option("--stop", multiple=True, help="Text that ends the answer; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token.")
@click.option(
    "--logprobs", type=int, help="Report log-probabilities, and so many alternatives (JSON)."
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="One JSON object per prompt: prompt, text, token_ids, finish_reason, …",
)
def command(**options: Any) -> None:
    """Generate text with MODEL, a local checkpoint folder.

    Without MODEL the small demo model that comes with bedplate answers. A single prompt is
    shown as it is written; several run as one batch. With --shadow the exit status is 1 if a
    part of the model gave something else on the second backend.
    """
    from bedplate.cli.progress import show_progress

    prompts = _prompts(options.pop("prompts"), options.pop("prompt_file"))
    as_json, chat = options.pop("as_json"), options.pop("chat")
    params = _params(options)
    path = options.pop("config_path")
    if options["model"] is None:
        click.echo("No model named: using the bundled demo model (5.5 M parameters).", err=True)
    with show_progress() as progress:
        engine = _open(options, path, progress)
    with engine:
        inputs = _inputs(engine, prompts, chat)
        if len(inputs) == 1 and not as_json:
            _stream(engine, inputs[0], params)
        else:
            with show_progress() as progress:
                outputs = engine.generate(inputs, params, progress=progress.requests)
            for prompt, output in zip(prompts, outputs, strict=True):
                _show(prompt, output, as_json=as_json)
        report = engine.shadow
    if report is not None:
        click.echo(report, err=True)
        sys.exit(report.first is not None)


def _prompts(given: tuple[str, ...], file: Path | None) -> list[str]:
    prompts = list(given)
    if file is not None:
        prompts += [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    if not prompts and not sys.stdin.isatty():
        prompts = [text] if (text := sys.stdin.read().strip()) else []
    if not prompts:
        raise ConfigError(
            "There is no prompt. Give one with -p 'text', a file with -f, or pipe it in"
        )
    return prompts


def _params(options: dict[str, Any]) -> SamplingParams:
    from bedplate.runner.sampling_params import SamplingParams

    names = (
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "stop",
        "ignore_eos",
        "logprobs",
    )
    return SamplingParams(**{name: options.pop(name) for name in names})


def _open(options: dict[str, Any], path: Path | None, progress: Any) -> Engine:
    from bedplate.config import resolve_config
    from bedplate.engine.engine import Engine

    config = resolve_config(options, options=True, path=path)
    return Engine.from_config(config, progress=progress.stage)


def _inputs(engine: Engine, prompts: list[str], chat: bool | None) -> list[str | list[int]]:
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ConfigError(
            "The model's folder has no tokenizer, so there is no text to read or write. Put "
            "tokenizer.json there, or name a folder that has one with --tokenizer"
        )
    if chat is None:
        chat = tokenizer.has_chat_template
    if not chat:
        return list(prompts)
    return [tokenizer.apply_chat_template([{"role": "user", "content": p}]) for p in prompts]


def _stream(engine: Engine, prompt: str | list[int], params: SamplingParams) -> None:
    for delta in engine.stream(prompt, params):
        click.echo(delta.text, nl=False)
        sys.stdout.flush()
    click.echo()


def _show(prompt: str, output: RequestOutput, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"prompt": prompt, **output.to_dict()}, ensure_ascii=False))
        return
    click.echo(f"> {prompt}\n{output.text.strip()}\n")
