# SPDX-License-Identifier: Apache-2.0
"""What the backend answers while it is taken, on a torch that pretends to have the device."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bedplate.contract import ActivateRequest, AttentionRequest, KVPoolRequest
from bedplate.errors import BackendUnavailableError, ConfigError, ContractError
from bedplate.memory.factory import make_allocator
from bedplate.reference.runtime import TorchRuntime
from bedplate_npu import availability, collectives
from bedplate_npu import runtime as runtime_module
from bedplate_npu.attention import make_provider
from bedplate_npu.memory import NpuKVPool
from bedplate_npu.plugin import backend
from bedplate_npu.runtime import NpuRuntime
from bedplate_npu.selftest import call_of

LATENT = {"num_kv_heads": 1, "head_dim": 576, "value_dim": 512, "value_in_key": True}


class FakeNpu:
    """Answers of ``torch.npu`` while a device is taken."""

    def __init__(self, monkeypatch, *, devices=1, soc=220, importing=None, cuda=None):
        self.devices, self.soc = devices, soc
        real = importlib.import_module

        def import_module(name, *rest):
            if name != "torch_npu":
                return real(name, *rest)
            if importing is not None:
                raise importing
            return SimpleNamespace()

        monkeypatch.setattr(runtime_module.importlib, "import_module", import_module)
        monkeypatch.setattr(torch, "get_device_module", lambda _device=None: self)
        monkeypatch.setattr(
            runtime_module.torch, "device", lambda kind, index: f"{kind}:{index}"
        )
        monkeypatch.setattr(torch.version, "cuda", cuda)

    def device_count(self):
        return self.devices

    def set_device(self, device):
        if int(device[-1]) >= self.devices:
            raise RuntimeError("SetDevice failed: invalid device id\nmore")

    def get_soc_version(self):
        return self.soc


REFUSALS = [
    ({"devices": 0}, {}, "HW010", ["sees no device", "npu-smi"]),
    ({}, {"device_index": 4}, "HW010", ["npu:4 cannot be used: SetDevice failed", "1 devices"]),
    ({"soc": 202}, {}, "HW012", ["310p", "usable are Atlas A2"]),
    ({"soc": 102}, {}, "HW012", ["910a"]),
    ({"cuda": "13.0"}, {}, "HW011", ["built for CUDA", "an environment of its own"]),
    (
        {"importing": ImportError("libhccl.so: cannot open")},
        {},
        "HW010",
        ["libhccl.so: cannot"],
    ),
    ({"importing": OSError("libatb")}, {}, "HW010", ["libatb"]),
    ({"importing": RuntimeError("PTA version mismatch")}, {}, "HW010", ["version mismatch"]),
]


@pytest.mark.parametrize(("fake", "request_", "code", "parts"), REFUSALS)
def test_what_cannot_be_taken_is_refused(monkeypatch, fake, request_, code, parts):
    FakeNpu(monkeypatch, **fake)
    with pytest.raises(BackendUnavailableError) as caught:
        NpuRuntime(ActivateRequest(**request_))
    assert caught.value.code == code
    assert all(part in caught.value.message for part in parts)


@pytest.mark.parametrize(
    ("versions", "environment", "code", "part"),
    [
        (
            {"torch_npu": "2.13.0", "wanted_torch": "torch==2.12.*"},
            {},
            "HW011",
            "made for torch",
        ),
        ({"torch_npu": ""}, {}, "HW010", "torch_npu is not installed"),
        ({}, {"LD_LIBRARY_PATH": ""}, "HW010", "set_env.sh"),
        ({}, None, "HW010", "CANN has the version"),
    ],
)
def test_an_import_that_fails_is_explained(
    monkeypatch, tmp_path, versions, environment, code, part
):
    if environment is None:
        for name in ("libascendcl.so", "libhccl.so"):
            (tmp_path / name).touch()
        environment = {"LD_LIBRARY_PATH": str(tmp_path)}
    found = availability.Installed(
        **{"torch": "2.13.0", "cuda": False, "torch_npu": "2.13.0", "wanted_torch": ""}
        | versions
    )
    FakeNpu(monkeypatch, importing=ImportError("something"))
    monkeypatch.setattr(availability, "installed", lambda: found)
    with pytest.raises(BackendUnavailableError) as caught:
        NpuRuntime(ActivateRequest(environment=environment))
    assert caught.value.code == code
    assert part in caught.value.message


@pytest.mark.parametrize(
    "options", [{"threads": 4}, {"self_test": "yes"}, {"max_graphs": True}]
)
def test_unknown_options_are_refused(options):
    with pytest.raises(ConfigError, match=r"its options are self_test \(bool\)"):
        NpuRuntime(ActivateRequest(options=options))


@pytest.mark.parametrize(
    ("message", "part"),
    [
        ("NPU out of memory. Tried to allocate", "--mem-fraction"),
        ("error code is 107027", "waited for the device while a graph"),
        ("error code is 107030", "copied synchronously"),
        ("error code is 207008", "--capture-sizes"),
        ("libatb.so: cannot open shared object file", "NNAL"),
        ("something else", None),
    ],
)
def test_vendor_errors_are_explained(message, part):
    said = backend.bedplate_explain_error(RuntimeError(message))
    assert said is None if part is None else part in said


def asked(**changes):
    call = changes.pop("call", call_of())
    defaults = {"dtype": "bfloat16", "kv_dtype": "bfloat16", "page_size": 128}
    return AttentionRequest(calls=(call_of(), call), **(defaults | changes))


SERVED = [
    ({}, None),
    ({"call": call_of(head_dim=80, value_dim=80)}, None),
    ({"call": call_of(window=9)}, None),
    ({"call": call_of(**LATENT)}, None),
    ({"dtype": "float32", "kv_dtype": "float32"}, "--dtype bfloat16"),
    ({"kv_dtype": "float8_e5m2"}, "keys of the same"),
    ({"page_size": 16}, "pages of 128"),
    ({"call": call_of(softcap=30.0)}, "soft caps"),
    ({"call": call_of(chunk=8)}, "chunks"),
    ({"call": call_of(causal=False)}, "later tokens"),
    ({"call": call_of(num_heads=130, num_kv_heads=2)}, "130 heads over 2"),
    ({"call": call_of(head_dim=40, value_dim=40)}, "heads of 40"),
    ({"call": call_of(head_dim=24, value_dim=12)}, "keys of 24 and values of 12"),
    ({"call": call_of(**LATENT | {"head_dim": 40, "value_dim": 32})}, "512 and 64 it must be"),
    ({"call": call_of(sinks=True)}, "no operator with sinks"),
]


@pytest.mark.parametrize(("changes", "part"), SERVED)
def test_what_attention_serves(monkeypatch, changes, part):
    from bedplate_npu import attention

    monkeypatch.setattr(attention.ops, "has", lambda _name: False)
    answer = make_provider({}).supports(asked(**changes))
    assert bool(answer) == (part is None)
    assert part is None or part in answer.reason


def test_sinks_need_a_packed_form(monkeypatch):
    from bedplate_npu import attention

    monkeypatch.setattr(attention.ops, "has", lambda _name: True)
    supports = make_provider({}).supports
    assert supports(asked(call=call_of(sinks=True)))
    refused = supports(asked(call=call_of(sinks=True, head_dim=80, value_dim=80)))
    assert "have no form" in refused.reason


@pytest.mark.parametrize(
    ("feature", "call"),
    [("windows", call_of(window=9)), ("latents", call_of(**LATENT)), ("attention", call_of())],
)
def test_what_the_self_test_switched_off_is_not_served(feature, call):
    answer = make_provider({feature: "the self-test found nonsense"}).supports(asked(call=call))
    assert not answer
    assert "found nonsense" in answer.reason


def pool_of(calls, dtype=torch.float32, tokens=256):
    return NpuKVPool(
        KVPoolRequest(
            runtime=TorchRuntime("cpu"), calls=calls, num_tokens=tokens, page_size=128,
            dtype=dtype,
        )
    )  # fmt: skip


def test_pages_of_another_size_are_refused():
    with pytest.raises(ContractError, match="--page-size"):
        backend.bedplate_make_kv_pool(
            KVPoolRequest(
                runtime=TorchRuntime("cpu"), calls=(call_of(),), num_tokens=160, page_size=16,
                dtype=torch.bfloat16,
            )
        )  # fmt: skip


def test_latents_lie_in_two_contiguous_parts():
    pool = pool_of((call_of(**LATENT), call_of(1)))
    latent, rope = pool.pages(0)
    assert (latent.shape, rope.shape) == ((3, 128, 512), (3, 128, 64))
    assert latent.is_contiguous()
    assert rope.is_contiguous()
    rows = torch.randn(2, 1, 576)
    pool.write(0, torch.tensor([130, 300]), rows, None)
    assert torch.equal(pool.key(0)[[130, 300]], rows)
    assert torch.equal(pool.value(0)[[130, 300]], rows[..., :512])
    copy = pool.get_cpu_copy(torch.tensor([130]))
    pool.load_cpu_copy(copy, torch.tensor([131]))
    assert torch.equal(pool.key(0)[131], rows[0])
    assert pool.nbytes == 384 * (576 + 2 * 2 * 64) * 4


def test_values_are_missed():
    pool = pool_of((call_of(), call_of(1, alias_of=0)))
    with pytest.raises(ContractError, match="stores values, but got none"):
        pool.write(0, torch.tensor([130]), torch.zeros(1, 2, 64), None)
    pool.write(1, torch.tensor([130]), torch.zeros(1, 2, 64), None)  # an alias writes nothing
    pool.write(0, torch.tensor([130]), torch.ones(1, 2, 64), torch.ones(1, 2, 64))
    assert pool.key(1)[130].all()


def test_the_last_page_goes_to_the_row_that_needs_it():
    """V19b: a rank that is not clamped reads beyond the free pages for a row without need."""
    from bedplate.contract import AllocatorRequest

    allocator = make_allocator(
        AllocatorRequest(num_tokens=20, page_size=4, index_dtype="int32")
    )
    taken = allocator.alloc(20)
    allocator.free(taken[taken // 4 == 5])
    slots = allocator.alloc_decode(np.array([9, 7], np.int32), np.array([35, 13], np.int32))
    assert slots.tolist() == [20, 14]
    assert slots.dtype == np.int32
    assert allocator.alloc_decode(np.array([9], np.int32), np.array([35], np.int32)) is None


def test_groups_have_names():
    group = SimpleNamespace(
        _get_backend=lambda device: SimpleNamespace(
            get_hccl_comm_name=lambda rank: f"{device}-tp-{rank}"
        )
    )
    assert collectives.BACKEND == "hccl"
    assert collectives.communicator_name(group, torch.device("cpu"), 3) == "cpu-tp-3"
