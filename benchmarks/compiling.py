# SPDX-License-Identifier: Apache-2.0
"""Compile what cases launch into the disk's cache, by many processes and without the device."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from kernels.matrix.offline import use_offline_driver

from bedplate_triton import configs
from bedplate_triton.cases import all_cases
from bedplate_triton.features import Features
from benchmarks.device import with_chain

if TYPE_CHECKING:
    from collections.abc import Sequence

Job = tuple[str | None, str, dict[str, Any]]
"""File of configurations, label of the case, and what to override in the file."""


def compile_all(jobs: Sequence[Job], features: Features) -> list[str]:
    """Compile everything; for each job what went wrong, empty if nothing did."""
    # The chain is a device function, which cannot be sent to another process.
    facts = {f.name: getattr(features, f.name) for f in fields(features) if f.name != "chain"}
    work = partial(_compile, facts)
    # Forked processes would inherit a device context that they cannot use.
    context = multiprocessing.get_context("spawn")
    workers = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(work, jobs, chunksize=2))


def _compile(facts: dict[str, Any], job: Job) -> str:
    import triton

    features = with_chain(Features(**facts))
    file, label, candidate = job
    run = triton.runtime.JITFunction.run
    triton.runtime.JITFunction.run = lambda kernel, *args, grid, warmup, **options: run(
        kernel, *args, grid=grid, warmup=True, **options
    )
    try:
        use_offline_driver(features.arch, features.wave)
        case = next(case for case in all_cases() if case.label == label)
        with nullcontext() if file is None else configs.override(file, **candidate):
            case.run(case.make(torch.device("meta"), 0), features)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    finally:
        triton.runtime.JITFunction.run = run
    return ""
