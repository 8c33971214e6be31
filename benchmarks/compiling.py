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

from bedplate_triton import configs
from bedplate_triton.cases import all_cases
from bedplate_triton.features import Features

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


class _Offline:
    """A driver that knows its target and needs no context."""

    def __init__(self, arch: str) -> None:
        self.capability = int(arch.removeprefix("sm_"))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def _compile(facts: dict[str, Any], job: Job) -> str:
    import triton

    from bedplate_cuda import ops

    features = ops.with_chain(Features(**facts))
    file, label, candidate = job
    run = triton.runtime.JITFunction.run
    triton.runtime.JITFunction.run = lambda kernel, *args, grid, warmup, **options: run(
        kernel, *args, grid=grid, warmup=True, **options
    )
    try:
        triton.runtime.driver.set_active(_Offline(features.arch))
        case = next(case for case in all_cases() if case.label == label)
        with nullcontext() if file is None else configs.override(file, **candidate):
            case.run(case.make(torch.device("meta"), 0), features)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    finally:
        triton.runtime.JITFunction.run = run
    return ""
