# SPDX-License-Identifier: Apache-2.0
"""One host buffer, one copy: from the scheduler's arrays to the device's batch.

All of a step's integers are packed into one host buffer, copied in one transfer, and cut into
the tensors of a ``ForwardBatch``.  Where host and device share memory nothing is copied: the
tensors are views of the scheduler's arrays.

The copy also brings what the device's ``req_to_token`` table has to learn: slots of new
tokens and of cached prefixes.

Shapes: B requests, T new tokens, R rows of logits.
"""

from __future__ import annotations

__all__ = ["Staging"]

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bedplate.batch.forward_batch import ExtendPart, ForwardBatch
from bedplate.errors import InternalError
from bedplate.runner.host_buffers import BUFFERS, HostBuffers

if TYPE_CHECKING:
    import numpy.typing as npt

    from bedplate.batch.schedule_batch import ScheduleBatch
    from bedplate.contract.runtime import DeviceRuntime

    Int64Array = npt.NDArray[np.int64]


class Staging:
    """Turns ``ScheduleBatch`` into ``ForwardBatch`` on one device.

    Args:
        runtime: The device.
        req_to_token: ``[max_reqs + 1, max_context_len]`` int32, the device's table.
        index_dtype: Dtype of ``out_cache_loc`` on the device.
        unified: Host and device share memory (and the table).
        capacity_bytes: Size of each staging buffer; grows when a batch needs more.
    """

    def __init__(
        self,
        runtime: DeviceRuntime,
        req_to_token: Tensor,
        index_dtype: torch.dtype,
        *,
        unified: bool,
        capacity_bytes: int = 1 << 20,
    ) -> None:
        self._runtime = runtime
        self._table = req_to_token
        self._index_dtype = index_dtype
        self._unified = unified
        if not unified:
            self._host = HostBuffers(runtime, capacity_bytes)
            self._device = self._on_device(capacity_bytes)

    def stage(self, batch: ScheduleBatch, rows: Int64Array | None) -> ForwardBatch:
        """The device's batch; valid until the next but one call.

        Args:
            batch: What the scheduler decided.
            rows: ``[R]`` tokens whose logits are wanted; ``None`` = all.
        """
        arrays = self._arrays(batch, rows)
        tensors = self._share(arrays) if self._unified else self._copy(arrays)
        if not self._unified:
            table = self._table.view(-1)
            table[tensors["table_index"]] = tensors["table_slots"]
        return self._cut(batch, tensors)

    def _arrays(
        self, batch: ScheduleBatch, rows: Int64Array | None
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Everything the device needs, 8-byte items first so that all are aligned."""
        wide = self._index_dtype == torch.int64
        slots = batch.out_cache_loc
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "input_ids": batch.input_ids,
            "positions": batch.positions,
        }
        if rows is not None:
            arrays["logits_rows"] = rows
        if wide:
            arrays["out_cache_loc"] = slots.astype(np.int64)
        if not self._unified:
            arrays |= self._table_update(batch)
        if not wide:
            arrays["out_cache_loc"] = slots
        arrays["req_pool_indices"] = batch.req_pool_indices
        arrays["seq_lens"] = batch.seq_lens
        if batch.extend_seq_lens is not None and batch.extend_prefix_lens is not None:
            arrays["extend_seq_lens"] = batch.extend_seq_lens
            arrays["extend_prefix_lens"] = batch.extend_prefix_lens
            ends = np.cumsum(batch.extend_seq_lens, dtype=np.int32)
            arrays["extend_start_loc"] = ends - batch.extend_seq_lens
        return arrays

    def _table_update(self, batch: ScheduleBatch) -> dict[str, npt.NDArray[np.generic]]:
        width = self._table.shape[1]
        rows = batch.req_pool_indices.astype(np.int64)
        if batch.extend_seq_lens is not None:
            rows = np.repeat(rows, batch.extend_seq_lens)
        index, slots = rows * width + batch.positions, batch.out_cache_loc
        cached = batch.table_update
        if cached is not None:
            index = np.concatenate(
                [cached.rows.astype(np.int64) * width + cached.columns, index]
            )
            slots = np.concatenate([cached.slots, slots])
        return {"table_index": index, "table_slots": slots}

    def _share(self, arrays: dict[str, npt.NDArray[np.generic]]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _copy(self, arrays: dict[str, npt.NDArray[np.generic]]) -> dict[str, Tensor]:
        offsets, size = {}, 0
        for name, array in arrays.items():
            size += -size % array.itemsize
            offsets[name] = size
            size += array.nbytes
        host, device = self._take(size)
        packed = host.numpy()
        for name, array in arrays.items():
            packed[offsets[name] : offsets[name] + array.nbytes] = array.view(np.uint8).reshape(
                -1
            )
        device.copy_(host, non_blocking=True)
        self._host.sent()
        return {
            name: device[offsets[name] : offsets[name] + array.nbytes].view(_torch_dtype(array))
            for name, array in arrays.items()
        }

    def _take(self, size: int) -> tuple[Tensor, Tensor]:
        """The next buffer of the host and of the device."""
        if size > len(self._device[0]):
            self._runtime.synchronize()  # what reads the old ones may still be queued
            self._device = self._on_device(2 * size)
        host = self._host.take(size)
        return host, self._device[self._host.turn][:size]

    def _on_device(self, num_bytes: int) -> list[Tensor]:
        return [
            torch.empty(num_bytes, dtype=torch.uint8, device=self._runtime.device)
            for _ in range(BUFFERS)
        ]

    def _cut(self, batch: ScheduleBatch, tensors: dict[str, Tensor]) -> ForwardBatch:
        return ForwardBatch(
            mode=batch.mode,
            batch_size=batch.batch_size,
            input_ids=tensors["input_ids"],
            positions=tensors["positions"],
            req_pool_indices=tensors["req_pool_indices"],
            seq_lens=tensors["seq_lens"],
            seq_lens_cpu=torch.from_numpy(batch.seq_lens),
            out_cache_loc=tensors["out_cache_loc"],
            logits_rows=tensors.get("logits_rows"),
            capture_hidden=batch.capture_hidden,
            extend=_extend_part(batch, tensors),
        )


def _extend_part(batch: ScheduleBatch, tensors: dict[str, Tensor]) -> ExtendPart | None:
    if batch.extend_seq_lens is None or batch.extend_prefix_lens is None:
        if batch.mode.is_extend():
            raise InternalError(
                f"The scheduler made a {batch.mode.name} batch without extend lengths. Please "
                "report it with the request that led to it"
            )
        return None
    return ExtendPart(
        seq_lens=tensors["extend_seq_lens"],
        prefix_lens=tensors["extend_prefix_lens"],
        start_loc=tensors["extend_start_loc"],
        seq_lens_cpu=torch.from_numpy(batch.extend_seq_lens),
        prefix_lens_cpu=torch.from_numpy(batch.extend_prefix_lens),
    )


def _torch_dtype(array: npt.NDArray[np.generic]) -> torch.dtype:
    return torch.int64 if array.itemsize == 8 else torch.int32
