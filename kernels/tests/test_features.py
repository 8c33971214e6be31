# SPDX-License-Identifier: Apache-2.0
"""When a chained kernel lets the next one begin."""

from __future__ import annotations

import pytest
import torch
from kernels.tests.offline import compile_launches

from bedplate.errors import ContractError
from bedplate_triton import norm
from bedplate_triton.configs import override
from bedplate_triton.features import Chain, Features

MOMENTS = {
    "begin": ["release", "wait"],
    "input": ["wait and release"],
    "end": ["wait"],  # the device itself releases it then
}


@pytest.mark.parametrize("release", MOMENTS)
def test_every_program_keeps_to_the_moment(release, counted):
    chain, calls = counted
    x = torch.ones((2, 1000))
    with override("norm", release=release, rows=1):
        norm.rms_norm(x, x[0], 1e-6, "weight_fp32", features=Features(chain=chain))
    assert calls == MOMENTS[release] * 2


def test_an_unknown_moment_is_refused():
    with pytest.raises(ContractError, match="'soon'; known: begin, input, end"):
        Chain().arguments("soon")


@pytest.mark.parametrize(("release", "before"), [("begin", True), ("input", False)])
def test_the_device_is_told_at_the_moment(release, before):
    (compiled,) = compile_launches(
        "bedplate_triton.norm",
        "import torch\n"
        "from bedplate_cuda.ops import with_chain\n"
        "from bedplate_triton.features import Features\n"
        "features = with_chain(Features(arch='sm_90', cores=132, shared_bytes=227 << 10))\n"
        "x = torch.empty((8, 1024), dtype=torch.bfloat16, device='meta')\n"
        f"with configs.override('norm', release='{release}'):\n"
        "    rms_norm(x, x[0], 1e-6, 'weight_fp32', features=features)",
    )
    first, _, second = compiled["assembly"].partition("griddepcontrol.wait")
    release_in = first if before else second
    assert compiled["assembly"].count("griddepcontrol.launch_dependents") == 1
    assert "griddepcontrol.launch_dependents" in release_in
