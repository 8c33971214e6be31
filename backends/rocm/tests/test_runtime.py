# SPDX-License-Identifier: Apache-2.0
"""Taking a device and refusing it, on the simulated surface."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch
from backends.rocm.tests.hip import GIB

from bedplate.contract import ActivateRequest
from bedplate.errors import BackendUnavailableError, ConfigError
from bedplate_rocm.ops import device_features, register
from bedplate_rocm.plugin import backend
from bedplate_rocm.runtime import HipRuntime, capabilities
from bedplate_triton import configs


def test_capabilities_are_those_of_the_architecture(hip):
    runtime = hip.runtime()
    found = capabilities(runtime)
    assert (found.device_type, found.arch) == ("cuda", "gfx942")
    assert found.kv_dtypes[-2:] == ("float8_e4m3fnuz", "float8_e5m2fnuz")
    assert found.graph.supported
    assert found.graph.default
    assert found.facts["toolkit"] == "7.1.0"
    assert "not yet run" in found.facts["tested"]


@pytest.mark.parametrize(
    ("arch", "narrow"),
    [
        ("gfx950:sramecc+:xnack-", ("float8_e4m3fn", "float8_e5m2")),
        ("gfx1201", ("float8_e4m3fn", "float8_e5m2")),
        ("gfx90a:sramecc+:xnack-", ()),
    ],
)
def test_eight_bits_are_encoded_as_the_architecture_does(hip, arch, narrow):
    hip.properties.gcnArchName = arch
    found = backend.bedplate_capabilities(backend.bedplate_activate(ActivateRequest()))
    assert tuple(name for name in found.kv_dtypes if "float8" in name) == narrow


def test_kernels_are_told_of_the_device_and_never_of_a_capability(hip):
    found = device_features()
    assert found is device_features()
    assert (found.arch, found.family, found.wave) == ("gfx942", "cdna", 64)
    assert (found.cores, found.slices, found.shared_bytes) == (304, 8, 64 << 10)
    assert found.chain.arguments().keys() == {"WAIT", "RELEASE"}  # no option to chain launches


def test_operations_are_offered_under_its_name(hip):
    offered = []
    register(SimpleNamespace(register=offered.append))
    assert {each.provider for each in offered} == {"rocm", "rocm, invariant"}
    assert {"linear", "rms_norm", "sample_tokens", "advance_decode"} <= {e.op for e in offered}


def test_expandable_segments_turn_graphs_off_unless_asked_for(hip):
    runtime = hip.runtime(PYTORCH_HIP_ALLOC_CONF="expandable_segments:True")
    found = capabilities(runtime).graph
    assert found.supported
    assert not found.default
    assert "expandable segments" in found.reason


@pytest.mark.parametrize(("integrated", "free"), [(False, 100 * GIB), (True, 3 * GIB)])
def test_memory_shared_with_the_host_is_no_more_than_is_free_there(
    hip, monkeypatch, integrated, free
):
    hip.properties.is_integrated = integrated
    host = SimpleNamespace(available=3 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    found = hip.runtime().memory()
    assert (found.free_bytes, found.total_bytes) == (free, 192 * GIB)
    assert found.allocated_bytes == 2 * GIB


def test_settings_of_the_environment_and_sizes_that_do_not_fit_are_for_explain(
    hip, monkeypatch
):
    monkeypatch.setattr(configs, "_refusals", [])
    sizes = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
    large, small = (
        configs.ConfigFile(
            folder=folder, op="invariant", rules=(), provenance={}, default=sizes | change
        )
        for folder, change in (("gfx942", {}), ("default", {"BLOCK_K": 16}))
    )
    monkeypatch.setattr(configs, "_files", lambda *_: (large, small))
    runtime = hip.runtime(HIP_FORCE_DEV_KERNARG="1")
    for _ in range(2):
        configs.choose("invariant", device_features(), bytes=2)
    found = {each.point: each for each in runtime.decisions()}
    assert len(found) == len(runtime.decisions())
    assert {point: each.chosen for point, each in found.items()} == {
        "sizes.invariant": "default",
        "environment.HIP_FORCE_DEV_KERNARG": "1",
        "environment.TORCH_BLAS_PREFER_HIPBLASLT": "not set",
    }
    assert "66,560 bytes of shared memory" in found["sizes.invariant"].candidates[0].reason


def test_one_life(hip):
    runtime = hip.runtime()
    with runtime.inference_guard():
        assert not torch.is_grad_enabled()
    runtime.synchronize()
    runtime.shutdown()
    assert hip.log == ["wait", "wait", "empty cache"]


@pytest.mark.parametrize(
    ("change", "code", "parts"),
    [
        ({"arch": "gfx1030"}, "HW012", ["is gfx1030", "gfx90a, gfx942", "--backend cpu"]),
        ({"failure": RuntimeError("HIP error: invalid device ordinal\nmore")}, "HW010",
         ["cuda:3", "invalid device ordinal.", "rocminfo", "ROCm 7.1.0"]),
        ({"failure": AssertionError("No driver.")}, "HW010", ["No driver. See"]),
    ],
)  # fmt: skip
def test_device_that_cannot_be_used_is_refused(hip, change, code, parts):
    hip.properties.gcnArchName = change.get("arch", hip.properties.gcnArchName)
    hip.failure = change.get("failure")
    with pytest.raises(BackendUnavailableError) as caught:
        HipRuntime(ActivateRequest(device_index=3))
    assert caught.value.code == code
    assert all(part in caught.value.message for part in parts)


def test_another_build_of_torch_is_refused_when_taken(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None, raising=False)
    with pytest.raises(BackendUnavailableError, match=r"pytorch\.org") as caught:
        HipRuntime(ActivateRequest())
    assert caught.value.code == "HW011"


def test_unknown_option_is_refused():
    with pytest.raises(ConfigError, match="has no option threads"):
        HipRuntime(ActivateRequest(options={"threads": "all"}))
