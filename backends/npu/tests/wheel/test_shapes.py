# SPDX-License-Identifier: Apache-2.0
"""Layer C: the real operators of torch_npu without a device: schemas, shapes, refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.npu_wheel


@pytest.fixture(scope="module", autouse=True)
def torch_npu():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_npu

    return torch_npu


def schemas():
    from backends.npu.tests.simulated.schemas import read

    return read()


@pytest.mark.parametrize("name", schemas())
def test_the_copied_schema_is_the_live_one(name):
    packet, _, overload = name.partition(".")
    live = getattr(getattr(torch.ops.npu, packet), overload or "default")._schema
    assert str(live) == schemas()[name]


def on(place, *shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device=place)


TABLE = {"dtype": torch.int32}
CALLS = {
    "packed over fresh keys": lambda at, ops: (
        ops.fused_infer_attention(
            on(at, 7, 4, 64), on(at, 7, 2, 64), on(at, 7, 2, 64), layout="TND", num_heads=4,
            num_kv_heads=2, scale=0.1, q_lens=[3, 7], kv_lens=[3, 7], sparse_mode=3,
            mask=on(at, 2048, 2048, dtype=torch.int8),
        ), (7, 4, 64),
    ),
    "packed over pages, with a band": lambda at, ops: (
        ops.fused_infer_attention(
            on(at, 7, 4, 64), on(at, 9, 128, 128), on(at, 9, 128, 128), layout="TND",
            num_heads=4, num_kv_heads=2, scale=0.1, q_lens=[3, 7], kv_lens=[90, 200],
            block_table=on(at, 2, 2, **TABLE), sparse_mode=4, window=70,
            mask=on(at, 2048, 2048, dtype=torch.int8),
        ), (7, 4, 64),
    ),
    "sinks": lambda at, ops: (
        ops.fused_infer_attention(
            on(at, 7, 4, 64), on(at, 9, 128, 128), on(at, 9, 128, 128), layout="TND",
            num_heads=4, num_kv_heads=2, scale=0.1, q_lens=[3, 7], kv_lens=[90, 200],
            block_table=on(at, 2, 2, **TABLE), sparse_mode=3, sinks=on(at, 4),
            mask=on(at, 2048, 2048, dtype=torch.int8),
        ), (7, 4, 64),
    ),
    "decode": lambda at, ops: (
        ops.fused_infer_attention(
            on(at, 3, 1, 256), on(at, 9, 128, 128), on(at, 9, 128, 128), layout="BSH",
            num_heads=4, num_kv_heads=2, scale=0.1, kv_lens=[1, 90, 200],
            block_table=on(at, 3, 2, **TABLE),
            mask=on(at, 3, 1, 1, 256, dtype=torch.bool),
        ), (3, 1, 256),
    ),
    "one sequence": lambda at, ops: (
        ops.fused_infer_attention(
            on(at, 1, 5, 4, 80), on(at, 9, 128, 160), on(at, 9, 128, 160), layout="BSND",
            num_heads=4, num_kv_heads=2, scale=0.1, kv_lens=[90], sparse_mode=3,
            block_table=on(at, 1, 2, **TABLE), mask=on(at, 2048, 2048, dtype=torch.int8),
        ), (1, 5, 4, 80),
    ),
    "latent decode": lambda at, ops: (
        ops.fused_infer_attention(
            on(at, 3, 1, 4, 512), on(at, 9, 128, 512), on(at, 9, 128, 512), layout="BSND",
            num_heads=4, num_kv_heads=1, scale=0.1, kv_lens=[1, 90, 200],
            block_table=on(at, 3, 2, **TABLE), query_rope=on(at, 3, 1, 4, 64),
            key_rope=on(at, 9, 128, 64),
        ), (3, 1, 4, 512),
    ),
    "norm": lambda at, ops: (
        ops.rms_norm(on(at, 5, 64), on(at, 64), 1e-6, "weight_fp32"), (5, 64),
    ),
    "norm of one plus weight": lambda at, ops: (
        ops.rms_norm(on(at, 5, 64), on(at, 64), 1e-6, "one_plus_weight_fp32"), (5, 64),
    ),
    "sum and norm": lambda at, ops: (
        ops.add_norm(on(at, 5, 64), on(at, 5, 64), on(at, 64), None, 1e-6, "weight_fp32")[1],
        (5, 64),
    ),
    "gate": lambda at, ops: (ops.swiglu(on(at, 5, 64)), (5, 32)),
    "rotation": lambda at, ops: (
        ops.rotate(on(at, 5, 4, 64), cos=on(at, 5, 32), sin=on(at, 5, 32), style="half"),
        (5, 4, 64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_shapes_on_the_meta_device(name):
    from bedplate_npu import ops

    out, shape = CALLS[name]("meta", ops)
    assert tuple(out.shape) == shape
    assert out.dtype == torch.bfloat16


# Of fake tensors the rotation asks the device for a format, and without one ends the process.
@pytest.mark.parametrize("name", [name for name in CALLS if name != "rotation"])
def test_shapes_of_fake_tensors_on_the_device(name):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from bedplate_npu import ops

    with FakeTensorMode():
        out, shape = CALLS[name]("npu", ops)
    assert tuple(out.shape) == shape
    assert out.device.type == "npu"


@pytest.mark.parametrize(
    ("keyword", "value"),
    [("actual_seq_lenghts_kv", [1]), ("num_key_value_head", 1), ("actual_seq_lengths", "3"),
     ("scale", "0.1"), ("block_table", [1])],
)  # fmt: skip
def test_wrong_keywords_and_types_are_refused(keyword, value):
    at = "meta"
    with pytest.raises((RuntimeError, TypeError)):
        torch.ops.npu.npu_fused_infer_attention_score(
            on(at, 7, 4, 64), on(at, 7, 2, 64), on(at, 7, 2, 64), **{keyword: value}
        )


TAKE = """
import os
from bedplate.contract import ActivateRequest
from bedplate.errors import BackendUnavailableError
from bedplate_npu.runtime import NpuRuntime
try:
    NpuRuntime(ActivateRequest(environment=dict(os.environ)))
except BackendUnavailableError as error:
    print(error)
"""


def refusal(**variables):
    done = subprocess.run(
        [sys.executable, "-c", TAKE], env=os.environ | variables, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip().splitlines()[-1]


def test_no_device_is_refused():
    assert "torch_npu sees no device" in refusal()


def test_missing_libraries_are_named():
    said = refusal(LD_LIBRARY_PATH="")
    assert "libascendcl.so and libhccl.so" in said or "cannot be found" in said
    assert "set_env.sh" in said
    assert "[HW010]" in said
