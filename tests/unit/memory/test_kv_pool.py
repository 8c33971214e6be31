# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bedplate.contract.attention import AttentionCallSpec
from bedplate.contract.memory import HostKVCopy, KVPoolRequest
from bedplate.errors import ContractError
from bedplate.memory import kv_pool
from bedplate.memory.factory import make_kv_pool
from bedplate.memory.sizing import cell_bytes

if TYPE_CHECKING:
    from bedplate.memory.kv_pool import LayeredKVPool

ONE_BYTE_DTYPES = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, *ONE_BYTE_DTYPES]


class HostRuntime:
    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1


def call(call_id: int, heads: int = 2, dim: int = 4, value_dim: int | None = None, **more):
    return AttentionCallSpec(
        call_id=call_id,
        module=f"layers.{call_id}",
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=dim,
        value_dim=dim if value_dim is None else value_dim,
        scale=1.0,
        **more,
    )


def make_pool(
    *calls: AttentionCallSpec,
    num_tokens: int = 12,
    page_size: int = 4,
    dtype=torch.float32,
    runtime: HostRuntime | None = None,
) -> LayeredKVPool:
    return make_kv_pool(
        KVPoolRequest(
            runtime=runtime or HostRuntime(),
            calls=calls,
            num_tokens=num_tokens,
            page_size=page_size,
            dtype=dtype,
        )
    )


def slots(*values: int, dtype=torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Bits, so that comparison never fails on a dtype without equality."""
    return tensor.contiguous().view(torch.uint8)


def small_numbers(*shape: int) -> torch.Tensor:
    """Numbers that every dtype here holds exactly."""
    return torch.randint(-4, 5, shape).float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_what_is_written_is_read(dtype: torch.dtype, index_dtype: torch.dtype):
    pool = make_pool(call(0), call(1, value_dim=3), dtype=dtype)
    k, v = small_numbers(3, 2, 4), small_numbers(3, 2, 3)
    where = slots(15, 4, 9, dtype=index_dtype)
    pool.write(1, where, k, v)
    assert pool.key(1).dtype == pool.value(1).dtype == dtype
    assert torch.equal(pool.key(1)[where.long()].float(), k)
    assert torch.equal(pool.value(1)[where.long()].float(), v)
    assert not raw(pool.key(0)).any()
    others = [slot for slot in range(16) if slot not in (15, 4, 9)]
    assert not raw(pool.key(1))[others].any()


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from([2, 8]), st.sampled_from([1, 2])),
        min_size=1,
        max_size=4,
    )
)
@settings(max_examples=25)
def test_every_call_has_its_own_geometry(sizes: list[tuple[int, int, int]]):
    calls = [call(i, heads, dim, value) for i, (heads, dim, value) in enumerate(sizes)]
    pool = make_pool(*calls)
    for i, (heads, dim, value) in enumerate(sizes):
        assert pool.key(i).shape == (16, heads, dim)
        assert pool.value(i).shape == (16, heads, value)
        k = torch.full((1, heads, dim), i + 1.0)
        pool.write(i, slots(5), k, torch.ones(1, heads, value))
    for i in range(len(sizes)):
        assert (pool.key(i)[5] == i + 1).all()
    assert pool.nbytes == sum(16 * heads * (dim + value) * 4 for heads, dim, value in sizes)
    assert pool.nbytes == pool.num_slots * cell_bytes(calls, itemsize=4)


def test_call_ids_may_be_those_of_a_later_stage():
    pool = make_pool(call(7), call(8))
    pool.write(8, slots(4), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    assert pool.key(8)[4].all()
    assert not pool.key(7).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_a_latent_call_stores_keys_only(dtype: torch.dtype):
    latent = call(0, heads=1, dim=6, value_dim=4, value_in_key=True)
    pool = make_pool(latent, dtype=dtype)
    k = small_numbers(2, 1, 6)
    pool.write(0, slots(3, 5), k, None)
    assert torch.equal(pool.value(0)[[3, 5]].float(), k[..., :4])
    assert pool.value(0).data_ptr() == pool.key(0).data_ptr()
    assert pool.nbytes == 16 * 6 * dtype.itemsize


def test_an_alias_reads_its_target_and_writes_nothing():
    pool = make_pool(call(0), call(1, alias_of=0))
    pool.write(0, slots(4), torch.full((1, 2, 4), 3.0), torch.full((1, 2, 4), 5.0))
    pool.write(1, slots(4), torch.full((1, 2, 4), 9.0), None)
    assert (pool.key(1)[4] == 3).all()
    assert (pool.value(1)[4] == 5).all()
    assert pool.key(1).data_ptr() == pool.key(0).data_ptr()
    assert pool.nbytes == 2 * 16 * 2 * 4 * 4


def test_an_alias_may_come_before_its_target():
    pool = make_pool(call(0, alias_of=1), call(1))
    assert pool.value(0) is pool.value(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_strided_rows_are_taken_as_they_are(dtype: torch.dtype):
    pool = make_pool(call(0), dtype=dtype)
    k = small_numbers(3, 2, 12).to(dtype)[..., :4]
    v = small_numbers(2, 4, 3).to(dtype).permute(2, 0, 1)
    assert not k.is_contiguous()
    assert v.stride(-1) != 1
    pool.write(0, slots(1, 2, 3), k, v)
    assert torch.equal(raw(pool.key(0)[1:4]), raw(k))
    assert torch.equal(raw(pool.value(0)[1:4]), raw(v))


def test_the_callers_tensors_are_left_alone():
    pool = make_pool(call(0), dtype=torch.float16)
    k = torch.full((1, 2, 4), 0.1)
    kept = k.clone()
    pool.write(0, slots(1), k, k)
    assert torch.equal(k, kept)


def test_a_page_is_one_contiguous_piece():
    pool = make_pool(call(0))
    assert pool.key(0).is_contiguous()
    assert pool.key(0).view(4, 4, 2, 4)[2].is_contiguous()


def test_storage_starts_finite_and_stays_in_place():
    pool = make_pool(call(0))
    address = pool.key(0).data_ptr()
    assert not pool.key(0).any()
    pool.write(0, slots(0, 0), torch.ones(2, 2, 4), torch.ones(2, 2, 4))
    assert pool.key(0).data_ptr() == address


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, torch.dtype | None]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), getattr(args[0], "dtype", None)))
        return func(*args, **(kwargs or {}))


def test_writing_is_two_indexed_copies_when_dtypes_agree():
    pool = make_pool(call(0))
    k, where = torch.ones(3, 2, 4), slots(1, 2, 3)
    with Recorder() as recorder:
        pool.write(0, where, k, k)
    assert recorder.calls == [("aten.index_put_.default", torch.float32)] * 2


@pytest.mark.parametrize("dtype", ONE_BYTE_DTYPES, ids=str)
def test_one_byte_floats_are_indexed_as_bytes(dtype: torch.dtype):
    pool = make_pool(call(0), dtype=dtype)
    with Recorder() as recorder:
        pool.write(0, slots(1), torch.ones(1, 2, 4), torch.ones(1, 2, 4))
        pool.move(slots(2), slots(1))
        pool.load_cpu_copy(pool.get_cpu_copy(slots(1)), slots(3))
    indexed = {dtype for name, dtype in recorder.calls if "index" in name}
    assert indexed == {torch.uint8}


def test_a_batch_without_rows_writes_nothing():
    pool = make_pool(call(0))
    pool.write(0, slots(), torch.ones(0, 2, 4), torch.ones(0, 2, 4))
    assert not pool.key(0).any()


@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 1, 4), (2, 2, 1), (2, 8)])
def test_a_wrong_shape_is_never_broadcast(shape: tuple[int, ...]):
    pool = make_pool(call(0))
    good = torch.ones(2, 2, 4)
    with pytest.raises(ContractError, match="one row a slot"):
        pool.write(0, slots(1, 2), torch.ones(shape), good)
    with pytest.raises(ContractError, match="one row a slot"):
        pool.write(0, slots(1, 2), good, torch.ones(shape))


def test_missing_values_are_an_error():
    pool = make_pool(call(0))
    with pytest.raises(ContractError, match=r"layers\.0\) stores values"):
        pool.write(0, slots(1), torch.ones(1, 2, 4), None)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([call(0), call(0)], "two calls have one call_id"),
        ([call(0, dim=4, value_dim=6, value_in_key=True)], "6 columns within keys of 4"),
        ([call(0, alias_of=3)], "reads call 3, which stores nothing"),
        ([call(0), call(1, alias_of=0), call(2, alias_of=1)], "call 2 reads call 1"),
        ([call(0), call(1, dim=8, alias_of=0)], r"call 1 reads \(2, 8, 8, False\)"),
    ],
)
def test_calls_that_contradict_are_refused(calls: list[AttentionCallSpec], message: str):
    with pytest.raises(ContractError, match=message):
        make_pool(*calls)


@pytest.mark.parametrize(("num_tokens", "page_size"), [(10, 4), (8, 0)])
def test_pages_must_be_whole(num_tokens: int, page_size: int):
    with pytest.raises(ContractError, match="no multiple of page size"):
        make_pool(call(0), num_tokens=num_tokens, page_size=page_size)


def filled_pool(dtype=torch.float32, **more) -> LayeredKVPool:
    """A pool whose slots hold their own number, plus 16 for values."""
    pool = make_pool(
        call(0),
        call(1, heads=1, dim=6, value_dim=2, value_in_key=True),
        call(2, alias_of=0),
        dtype=dtype,
        **more,
    )
    ramp = torch.arange(16.0).view(16, 1, 1)
    pool.write(0, torch.arange(16), ramp.expand(16, 2, 4), ramp.expand(16, 2, 4) + 16)
    pool.write(1, torch.arange(16), ramp.expand(16, 1, 6), None)
    return pool


def contents(pool: LayeredKVPool, call_id: int = 0) -> tuple[list[float], list[float]]:
    keys, values = pool.key(call_id)[:, 0, 0], pool.value(call_id)[:, 0, 0]
    return keys.float().tolist(), values.float().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_overlapping_moves_read_before_they_write(dtype, index_dtype):
    pool = filled_pool(dtype)
    pool.move(slots(5, 6, 7, 4, dtype=index_dtype), slots(4, 5, 6, 7, dtype=index_dtype))
    keys, values = contents(pool)
    assert keys[4:8] == [7, 4, 5, 6]
    assert values[4:8] == [torch.tensor(n).to(dtype).float() for n in (23.0, 20.0, 21.0, 22.0)]
    assert contents(pool, 1)[0][4:8] == [7, 4, 5, 6]


def test_moves_name_as_many_targets_as_sources():
    with pytest.raises(ContractError, match="cannot move 2 slots to 1"):
        filled_pool().move(slots(1), slots(2, 3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [2, 8192])
def test_a_host_copy_comes_back_to_other_slots(dtype, chunk: int, monkeypatch):
    monkeypatch.setattr(kv_pool, "_CHUNK_SLOTS", chunk)
    runtime = HostRuntime()
    pool = filled_pool(dtype, runtime=runtime)
    before = [raw(pool.key(i)).clone() for i in range(3)]
    copy = pool.get_cpu_copy(slots(4, 5, 6, 7, 8))
    assert copy.num_tokens == 5
    assert runtime.waits >= 1
    assert all(torch.equal(raw(pool.key(i)), before[i]) for i in range(3))

    other = make_pool(
        call(0),
        call(1, heads=1, dim=6, value_dim=2, value_in_key=True),
        call(2, alias_of=0),
        dtype=dtype,
        num_tokens=20,
    )
    target = slots(20, 12, 13, 14, 9)
    other.load_cpu_copy(copy, target)
    for i in range(3):
        assert torch.equal(raw(other.key(i)[target]), raw(pool.key(i)[4:9]))
        assert torch.equal(raw(other.value(i)[target]), raw(pool.value(i)[4:9]))


def test_a_host_copy_is_cut_into_chunks():
    pool = make_pool(call(0, heads=1, dim=1), num_tokens=16_400, page_size=1)
    copy = pool.get_cpu_copy(torch.arange(16_400))
    assert [len(chunk) for chunk in copy.tensors[0]] == [8192, 8192, 16]


def test_a_host_copy_outlives_what_happens_to_the_pool():
    pool = filled_pool()
    copy = pool.get_cpu_copy(slots(4, 5))
    pool.key(0).zero_()
    pool.load_cpu_copy(copy, slots(4, 5))
    assert contents(pool)[0][4:6] == [4, 5]


def test_no_slots_make_an_empty_copy():
    pool = filled_pool()
    pool.load_cpu_copy(pool.get_cpu_copy(slots()), slots())
    assert contents(pool)[0] == list(range(16))


def test_a_host_copy_that_does_not_fit_is_refused_before_writing():
    pool = filled_pool()
    copy = pool.get_cpu_copy(slots(4, 5))
    with pytest.raises(ContractError, match="2 slots into 3"):
        pool.load_cpu_copy(copy, slots(1, 2, 3))
    for stranger in (make_pool(call(0)), filled_pool(torch.float16)):
        with pytest.raises(ContractError, match="same calls and dtype"):
            stranger.load_cpu_copy(copy, slots(4, 5))
    with pytest.raises(ContractError, match="does not fit"):
        pool.load_cpu_copy(HostKVCopy(2, copy.tensors[:1]), slots(4, 5))
    assert contents(pool)[0] == list(range(16))
