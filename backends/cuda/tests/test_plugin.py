# SPDX-License-Identifier: Apache-2.0
"""What the backend answers before and while it is taken, on a machine without its device."""

from __future__ import annotations

import pytest
import torch

from bedplate.contract import ActivateRequest, Decision, ProbeRequest
from bedplate.errors import BackendUnavailableError, ConfigError
from bedplate.registry import survey
from bedplate.registry.select import BackendRequest, select_backend
from bedplate_cuda import driver, runtime
from bedplate_cuda.plugin import backend
from bedplate_triton import configs

CUDA = driver.TorchBuild(version="2.11.0+cu130")
HOST = driver.TorchBuild(version="2.13.0+cpu", problem="built without CUDA")
GPU = (driver.Gpu(name="H200"),)


def choose(monkeypatch, *, gpus, build, text="auto"):
    """Outcome of the registry where these devices and this torch are found."""
    monkeypatch.setattr(driver, "gpus", lambda _root=None: gpus)
    monkeypatch.setattr(driver, "driver_version", lambda _root=None: "580.1" if gpus else "")
    monkeypatch.setattr(driver, "torch_build", lambda: build)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return select_backend(BackendRequest(text=text, source="--backend"), survey())


@pytest.mark.parametrize(
    ("gpus", "build", "text", "chosen", "code"),
    [
        ((), HOST, "auto", "cpu", None),
        ((), HOST, "cuda", None, "HW010"),
        ((), HOST, "cuda,cpu", "cpu", None),
        (GPU, HOST, "auto", None, "HW051"),
        (GPU, HOST, "cuda", None, "HW011"),
        (GPU, HOST, "cpu", "cpu", None),
        (GPU, CUDA, "auto", "cuda", None),
        (GPU, CUDA, "cuda:1", None, "HW007"),
    ],
)
def test_choice(monkeypatch, gpus, build, text, chosen, code):
    selection = choose(monkeypatch, gpus=gpus, build=build, text=text)
    assert selection.decision.chosen == chosen
    assert (selection.error.code if selection.error else None) == code


def test_refusal_names_cause_and_remedy(monkeypatch):
    error = choose(monkeypatch, gpus=GPU, build=HOST, text="cuda").error
    for part in ("built without CUDA", "2.13.0+cpu", "CUDA build of torch", "bedplate doctor"):
        assert part in error.message


def test_report_works_without_a_device():
    names = [item.name for item in backend.bedplate_environment_report()]
    assert names == ["driver", "devices", "build of torch"]
    assert backend.bedplate_probe(ProbeRequest(environment={})).facts.keys() >= {"torch"}


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--mem-fraction"),
        (RuntimeError("CUDA error: no kernel image is available"), "get_arch_list"),
        (RuntimeError("something else"), None),
    ],
)
def test_vendor_errors_are_explained(error, sentence):
    explained = backend.bedplate_explain_error(error)
    assert explained is None if sentence is None else sentence in explained


class FakeCuda:
    """Answers of ``torch.cuda`` while a device is taken."""

    def __init__(self, monkeypatch, capability=(9, 0), failure=None):
        def set_device(device):
            if failure is not None:
                raise failure

        for name, function in {
            "set_device": set_device,
            "get_device_capability": lambda _device: capability,
            "get_device_name": lambda _device: "Tesla",
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize(
    ("fake", "code", "parts"),
    [
        ({"capability": (7, 5)}, "HW012", ["Tesla", "7.5", "8.0 or later"]),
        ({"failure": RuntimeError("CUDA error: invalid device ordinal\nmore")}, "HW010",
         ["cuda:3", "invalid device ordinal.", "nvidia-smi"]),
        ({"failure": AssertionError("The driver is too old.")}, "HW010", ["too old. See"]),
    ],
)  # fmt: skip
def test_device_that_cannot_be_used_is_refused(monkeypatch, fake, code, parts):
    FakeCuda(monkeypatch, **fake)
    with pytest.raises(BackendUnavailableError) as caught:
        runtime.CudaRuntime(ActivateRequest(device_index=3))
    assert caught.value.code == code
    assert all(part in caught.value.message for part in parts)


def test_host_build_of_torch_is_refused_when_taken(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendUnavailableError) as caught:
        runtime.CudaRuntime(ActivateRequest())
    assert caught.value.code == "HW011"


def test_sizes_that_do_not_fit_are_for_explain(monkeypatch):
    record = Decision(point="sizes.linear", chosen="default", candidates=())
    monkeypatch.setattr(configs, "_refusals", [record])
    assert object.__new__(runtime.CudaRuntime).decisions() == (record,)


def test_unknown_option_is_refused():
    with pytest.raises(ConfigError, match="has no option threads"):
        runtime.CudaRuntime(ActivateRequest(options={"threads": "all"}))
