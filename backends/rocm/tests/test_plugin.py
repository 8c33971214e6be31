# SPDX-License-Identifier: Apache-2.0
"""What the backend answers before it is taken, on a machine without its device."""

from __future__ import annotations

import pytest
import torch

from bedplate.contract import ProbeRequest
from bedplate.registry import survey
from bedplate.registry.select import BackendRequest, select_backend
from bedplate_rocm import driver
from bedplate_rocm.plugin import backend

ROCM = driver.TorchBuild(version="2.11.0+rocm7.1")
CUDA = driver.TorchBuild(version="2.11.0+cu130", problem="torch is built for CUDA")
GPU = (driver.Gpu(arch="gfx942", name="MI300X"),)
OLD = (driver.Gpu(arch="gfx908", name="MI100"),)


def pretend(monkeypatch, gpus, build):
    monkeypatch.setattr(driver, "gpus", lambda _root=None: gpus)
    monkeypatch.setattr(driver, "driver_version", lambda _root=None: "6.10" if gpus else "")
    monkeypatch.setattr(driver, "torch_build", lambda: build)
    monkeypatch.setattr(driver, "_can_open", lambda _node: True)
    for name in driver._LISTS:
        monkeypatch.delenv(name, raising=False)


def choose(monkeypatch, *, gpus, build, text="auto"):
    """Outcome of the registry where these devices and this torch are found."""
    pretend(monkeypatch, gpus, build)
    return select_backend(BackendRequest(text=text, source="--backend"), survey())


@pytest.mark.parametrize(
    ("gpus", "build", "text", "chosen", "code"),
    [
        ((), CUDA, "auto", "cpu", None),
        ((), CUDA, "rocm", None, "HW010"),
        ((), CUDA, "rocm,cpu", "cpu", None),
        (GPU, CUDA, "auto", None, "HW051"),
        (GPU, CUDA, "rocm", None, "HW011"),
        (OLD, ROCM, "rocm", None, "HW012"),
        (GPU, CUDA, "cpu", "cpu", None),
        (GPU, ROCM, "auto", "rocm", None),
        (GPU, ROCM, "rocm:1", None, "HW007"),
    ],
)
def test_choice(monkeypatch, gpus, build, text, chosen, code):
    selection = choose(monkeypatch, gpus=gpus, build=build, text=text)
    assert selection.decision.chosen == chosen
    assert (selection.error.code if selection.error else None) == code


def test_refusal_names_cause_and_remedy(monkeypatch):
    error = choose(monkeypatch, gpus=GPU, build=CUDA, text="rocm").error
    for part in ("built for CUDA", "2.11.0+cu130", "pytorch.org", "bedplate doctor"):
        assert part in error.message


def test_nothing_is_required_of_the_package_index():
    """Torch for ROCm and its Triton come from elsewhere, under other names."""
    assert backend.bedplate_manifest().requires == ()


@pytest.mark.parametrize(("gpus", "settings"), [((), False), (GPU, True)])
def test_report(monkeypatch, gpus, settings):
    pretend(monkeypatch, gpus, ROCM)
    names = [item.name for item in backend.bedplate_environment_report()]
    assert names[:3] == ["driver", "devices", "build of torch"]
    assert ("HIP_FORCE_DEV_KERNARG" in names) is settings
    assert backend.bedplate_probe(ProbeRequest(environment={})).facts.keys() >= {"torch"}


def test_proposals_are_settings():
    value, why = backend.bedplate_configure({})["chunked_prefill_tokens"]
    assert value == 8192
    assert why


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("HIP out of memory. Tried to allocate"), "--mem-fraction"),
        (RuntimeError("HIP error: invalid device function"), "get_arch_list"),
        (RuntimeError("Memory access fault by GPU node-1"), "AMD_SERIALIZE_KERNEL"),
        (RuntimeError("something else"), None),
    ],
)
def test_vendor_errors_are_explained(error, sentence):
    explained = backend.bedplate_explain_error(error)
    assert explained is None if sentence is None else sentence in explained
