# SPDX-License-Identifier: Apache-2.0
"""Seconds from starting a process to the first token, with compiled kernels and without.

    python -m benchmarks.cases.startup qwen3-0.6b --backend NAME

A checkpoint with made-up weights is written first.  The first start finds no compiled kernel,
the second finds those of the first.  Files are as the machine's cache has them: just written.
Modules of Python are compiled before, as an installer does; machines on which nobody did that
compile them at every start, which has nothing to do with us.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmarks.device import refuse_simulated_runtime
from benchmarks.shapes import SHAPES, write_config
from safetensors.torch import save_file

CHILD = """
import json, sys, time
begin = time.perf_counter()
from bedplate import Engine, SamplingParams
with Engine(sys.argv[1], backend=sys.argv[2], load_format=sys.argv[3]) as engine:
    imported = time.perf_counter() - begin
    from benchmarks.device import refuse_simulated
    refuse_simulated(engine)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    next(iter(engine.stream(list(range(5, 133)), params)))
    ready = time.perf_counter() - begin
    stages = {name: round(s, 2) for name, s in engine.runner.stage_seconds.items()}
    print(json.dumps({"to_engine": imported, "to_token": ready, "stages": stages}))
"""


def write_weights(shape: str, folder: Path) -> None:
    """One file of random numbers under the names and shapes of the configuration."""
    from bedplate.models.weights.build import build_module, read_config
    from bedplate.models.weights.dummy import DummySource

    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = build_module(read_config(folder, trust_remote_code=False), torch.bfloat16)
    source = DummySource(module, device=device)
    size, part, number = 0, {}, 0
    for name in source.infos:
        part[name] = source.read(name).cpu()
        size += part[name].nbytes
        if size > 4 << 30:
            save_file(part, folder / f"model-{number:05d}.safetensors")
            size, part, number = 0, {}, number + 1
    save_file(part, folder / f"model-{number:05d}.safetensors")


def environment_of(cache: Path) -> dict[str, str]:
    """No compiled kernels but those in ``cache``; compiled modules are there too."""
    changes = {
        "TRITON_CACHE_DIR": str(cache / "kernels"),
        "PYTHONPYCACHEPREFIX": str(cache / "modules"),
        "PYTHONDONTWRITEBYTECODE": "",
    }
    return os.environ | changes


def compile_modules(shape: str, backend: str, cache: Path) -> None:
    """Have what a start imports compiled, by a start that is not counted."""
    with tempfile.TemporaryDirectory() as kernels:
        environment = environment_of(cache) | {"TRITON_CACHE_DIR": kernels}
        with tempfile.TemporaryDirectory() as folder:
            write_config(shape, Path(folder))
            arguments = [sys.executable, "-c", CHILD, folder, backend, "dummy"]
            subprocess.run(arguments, env=environment, check=True, capture_output=True)


def start(folder: Path, backend: str, cache: Path) -> dict[str, object]:
    environment = environment_of(cache)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), backend, "safetensors"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    if done.returncode:
        sys.exit(done.stderr)
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    return {"process_s": seconds, **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    refuse_simulated_runtime()
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as cache:
        folder, kept = Path(name), Path(cache)
        compile_modules(options.shape, options.backend, kept)
        write_config(options.shape, folder)
        begin = time.perf_counter()
        write_weights(options.shape, folder)
        print(f"{options.shape}: written in {time.perf_counter() - begin:.1f} s", flush=True)
        results = {}
        for kind in ("no compiled kernels", "compiled kernels"):
            results[kind] = start(folder, options.backend, kept)
            print(f"{options.shape}, {kind}: {results[kind]}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
