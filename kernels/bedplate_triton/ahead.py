# SPDX-License-Identifier: Apache-2.0
"""Compile what a pass would launch, all of it at once and without running it.

A compile takes about a second, and a first pass launches dozens of kernels one after the
other.  In this context launches return at once; their kernels are compiled by many threads,
and lie ready when it ends.  What kernels would have written stays as it was, so only passes
whose results nobody wants belong here.
"""

from __future__ import annotations

__all__ = ["compile_ahead"]

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import triton
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def compile_ahead() -> Iterator[None]:
    """Collect launches; leave when all their kernels are compiled.

    A kernel that cannot be compiled says so when it is launched for real.
    """
    function: Any = triton.runtime.JITFunction
    run = function.run
    begun: set[Any] = set()

    def collect(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        """Compile for what sorts of arguments these are; layers repeat each other's."""
        sorts = (kernel, *map(_sort, args), *((n, _sort(v)) for n, v in options.items()))
        if sorts not in begun:
            begun.add(sorts)
            run(kernel, *args, grid=grid, warmup=True, **options)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        function.run = collect
        try:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                try:
                    yield
                finally:
                    function.run = run
        finally:
            function.run = run


def _sort(value: Any) -> Any:
    """Equal for arguments that no kernel is compiled anew for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return type(value), value
