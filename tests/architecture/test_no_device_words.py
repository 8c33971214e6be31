# SPDX-License-Identifier: Apache-2.0
"""Core and kernels name no device and no vendor: in code, strings, docstrings or comments."""

from __future__ import annotations

import io
import re
import tokenize

import pytest
from tests.architecture.tree import ROOT, core_files, kernel_files

WORDS = frozenset(
    {"amd", "ascend", "cublas", "cuda", "cudnn", "gpu", "gpus", "hccl", "hip", "hpu", "mps",
     "musa", "nccl", "npu", "npus", "nvidia", "rccl", "rocm", "tpu", "xpu"}
)  # fmt: skip
PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
"""Words of ``snake_case``, ``CamelCase`` and plain text."""


def device_words(source: str) -> list[str]:
    """``line: token`` for every token with a device word in it."""
    return [
        f"{token.start[0]}: {token.string.strip()[:60]}"
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if {part.lower() for part in PART.findall(token.string)} & WORDS
    ]


def test_core_and_kernels_name_no_device():
    hits = {
        str(path.relative_to(ROOT)): found
        for path in [*core_files(), *kernel_files()]
        if (found := device_words(path.read_text(encoding="utf-8")))
    }
    assert hits == {}


def test_no_file_of_them_is_named_after_a_device():
    words = {
        part.lower()
        for path in [*core_files(), *kernel_files()]
        for part in PART.findall(path.stem)
    }
    assert words & WORDS == set()


@pytest.mark.parametrize(
    "source",
    ["torch.cuda.synchronize()", "use_npu = 1", "class GPUPool: ...", "device = 'hip:0'",
     "def f(cudaStream): ...", "x = f'{name} on NVIDIA'", "x = 1  # only on ROCm: rocm"],
)  # fmt: skip
def test_the_search_sees_words_everywhere(source):
    assert device_words(source)


@pytest.mark.parametrize("source", ["ascending = 1", "x = 'ship'", "champion = relationship"])
def test_the_search_sees_whole_words_only(source):
    assert device_words(source) == []
