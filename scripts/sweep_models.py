#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Try every causal-LM class of the installed transformers, and write the table of results.

Each class is tried in a process of its own with a time limit: its full-size default
configuration is probed, and a tiny random model of it goes through the parity scenario.
Results are kept in a JSON file as they come, so an interrupted sweep goes on where it was.

    python scripts/sweep_models.py                    # all that has no result yet
    python scripts/sweep_models.py --again wrong      # those with this verdict once more
    python scripts/sweep_models.py LlamaForCausalLM   # some
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - the environment must be set first
import transformers  # noqa: E402
from tests.integration.parity.story import run_story  # noqa: E402
from tqdm import tqdm  # noqa: E402

from bedplate.errors import UnsupportedModelError  # noqa: E402
from bedplate.models import transformers_api as hf  # noqa: E402
from bedplate.models.hollow import hollow_model  # noqa: E402
from bedplate.models.probe import probe  # noqa: E402
from bedplate.testing import tiny_models  # noqa: E402

TOLERANCE = 1e-4
TIMEOUT_SECONDS = 240
UNRUNNABLE = "it cannot be run"
VERDICTS = {
    "certified": "at parity in the release-blocking suite of every change",
    "works": "at parity in this sweep",
    "refused": "refused at start, with the reason given",
    "untried": "no configuration of it could be run here; the probe refuses it too",
    "fails": "stops with an error at its first forward",
    "wrong": "runs and differs: a bug, please report",
}


def try_class(name):
    """The row of one class: verdict, reason and figures."""
    config_class, model_class = next(
        pair for pair in hf.causal_lm_classes() if pair[1].__name__ == name
    )
    row = {"model_type": config_class.model_type}
    row["full_size"] = _probe_full_size(model_class, config_class)
    overrides = tiny_models.FAMILIES.get(
        config_class.model_type, tiny_models.SWEEP_OVERRIDES.get(config_class.model_type)
    )
    try:
        config = tiny_models.tiny_config(config_class, overrides)
        spec = probe(model_class, config)
    except Exception as error:
        return row | _not_probed(row["full_size"], error)
    try:
        module = tiny_models.tiny_model(model_class, config)
        rig, sequences = run_story(module, spec, vocab_size=spec.vocab_size)
    except Exception as error:
        return row | {"verdict": "fails", "reason": f"{type(error).__name__}: {error}"}
    try:
        worst, spread = rig.check(*sequences), rig.spread(*sequences)
    except Exception as error:
        return row | {"verdict": "untried", "reason": f"transformers' own forward: {error}"}
    row |= {"error": worst, "spread": spread, "calls": len(spec.calls)}
    row["unseen"] = _unseen_modules(model_class, config_class, module)
    row["windows"] = sorted({call.window or call.chunk or 0 for call in spec.calls})
    if not worst <= TOLERANCE * max(1.0, spread):
        return row | {"verdict": "wrong", "reason": f"logits differ by {worst:.2g}"}
    if row["full_size"].startswith("refused"):
        # The tiny model lacks what its full size has.
        return row | {"verdict": "refused", "reason": row["full_size"].split(": ", 1)[1]}
    certified = config_class.model_type in tiny_models.FAMILIES
    return row | {"verdict": "certified" if certified else "works", "reason": ""}


def _not_probed(full_size, error):
    """Verdict of a class whose tiny model was not described: refused, or our shrinking."""
    reason = getattr(error, "reason", f"{type(error).__name__}: {error}")
    if isinstance(error, UnsupportedModelError) and UNRUNNABLE not in reason:
        return {"verdict": "refused", "reason": reason}
    if full_size.startswith("refused: "):
        return {"verdict": "refused", "reason": full_size.removeprefix("refused: ")}
    return {"verdict": "untried", "reason": reason}


def _probe_full_size(model_class, config_class):
    started = time.perf_counter()
    try:
        config = config_class()
        if hasattr(config, "is_decoder"):
            config.is_decoder = True
        spec = probe(model_class, config)
    except UnsupportedModelError as error:
        reason = error.facts["reason"]
        # A default configuration need not be one that any checkpoint has.
        unusable = reason.startswith(UNRUNNABLE)
        return f"{'unusable' if unusable else 'refused'}: {reason}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    return f"{len(spec.calls)} calls in {time.perf_counter() - started:.1f} s"


def _unseen_modules(model_class, config_class, tiny):
    """Kinds of modules that the full-size default has and the tiny model lacks."""
    try:
        full = hollow_model(model_class, config_class())
    except Exception:  # not every default configuration can be built
        return []
    kinds = [{type(module).__name__ for module in model.modules()} for model in (full, tiny)]
    return sorted(kinds[0] - kinds[1])


def _work(name, pipe):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pipe.send(try_class(name))


def run_one(name):
    """``try_class`` in a process of its own; a crash or a time-out is a result too."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, sender))
    process.start()
    sender.close()
    row = {"verdict": "untried", "reason": f"no answer within {TIMEOUT_SECONDS} s"}
    if receiver.poll(TIMEOUT_SECONDS):
        try:
            row = receiver.recv()
        except EOFError:
            row = {"verdict": "untried", "reason": "its process ended without an answer"}
    process.kill()
    process.join()
    return row


def write_table(rows, path):
    """The reference page: the classes of this version, the counts of every version here."""
    stored = sorted(path.parent.glob("models-*.json"))
    versions = {file.stem.removeprefix("models-"): file for file in stored}
    counts = {v: _count(json.loads(file.read_text())) for v, file in versions.items()}
    lines = [
        "# Models",
        "",
        "Every causal-LM class of transformers: a tiny random model of each against",
        "transformers' own eager attention (float32; ragged and chunked prefill, prefix hit,",
        "preemption, decode; logits within 1e-4). Written by `scripts/sweep_models.py`.",
        "",
        f"| verdict | {' | '.join(counts)} | meaning |",
        "|---|" + "---|" * len(counts) + "---|",
        *(
            f"| {verdict} | {' | '.join(str(count[verdict]) for count in counts.values())} "
            f"| {text} |"
            for verdict, text in VERDICTS.items()
        ),
        (
            f"| looked at | {' | '.join(str(count.total()) for count in counts.values())} "
            "| classes that the sweep has reached; the next run goes on with the rest |"
        ),
        "",
        f"The lists are those of transformers {transformers.__version__}. *Not tried* names",
        "the module kinds of the full-size default that the tiny model lacks.",
        "",
    ]
    for verdict in VERDICTS:
        chosen = sorted(name for name, row in rows.items() if row["verdict"] == verdict)
        if chosen:
            lines += [f"## {verdict.capitalize()}", "", *_section(verdict, chosen, rows), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def _count(rows):
    return Counter(row["verdict"] for row in rows.values())


def _section(verdict, names, rows):
    if verdict in ("certified", "works"):
        yield "| class | window or chunk tried | largest logit error | not tried |"
        yield "|---|---|---|---|"
        for name in names:
            row = rows[name]
            windows = ", ".join(str(w) for w in row["windows"] if w) or "none"
            unseen = ", ".join(f"`{kind}`" for kind in row.get("unseen", ()))
            yield f"| `{name}` | {windows} | {row['error']:.1e} | {unseen} |"
        return
    yield "| class | reason |"
    yield "|---|---|"
    for name in names:
        reason = " ".join(rows[name]["reason"].split()).replace("|", "\\|")[:220]
        yield f"| `{name}` | {reason} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("classes", nargs="*", help="only these classes")
    parser.add_argument("--again", default="", help="repeat these verdicts, with commas")
    parser.add_argument("--table", type=Path, default=ROOT / "docs/reference/models.md")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    version = transformers.__version__
    store = options.json or ROOT / f"docs/reference/models-{version}.json"
    rows = json.loads(store.read_text()) if store.exists() else {}
    names = options.classes or [m.__name__ for _, m in hf.causal_lm_classes()]
    fresh = options.classes or [
        n for n in names if n not in rows or rows[n]["verdict"] in options.again.split(",")
    ]
    store.parent.mkdir(parents=True, exist_ok=True)
    for name in tqdm(fresh, unit="class", disable=None):
        rows[name] = run_one(name)
        store.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
        if options.classes:
            print(name, json.dumps(rows[name], indent=1))
    write_table(rows, options.table)
    print(version, dict(_count(rows)))
    return 1 if _count(rows)["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
