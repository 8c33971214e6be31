# SPDX-License-Identifier: Apache-2.0
"""ForwardBatch: the device's half of one pass; what models and attention read.

Small on purpose: the fields that every pass has, and typed parts that are ``None`` when
absent.  A new field needs two unrelated models and two backends that read it.

Shapes: B requests, T new tokens (T = B in decode), R rows of logits.
"""

from __future__ import annotations

__all__ = ["ExtendPart", "ForwardBatch", "pad_tokens"]

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.nn import functional

from bedplate.batch.forward_mode import CaptureHiddenMode, ForwardMode
from bedplate.errors import ContractError

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate.batch.prefix_chunks import PrefixChunks


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtendPart:
    """What passes with several new tokens per request add.

    Attributes:
        seq_lens: ``[B]`` int32 device; new tokens per request.
        prefix_lens: ``[B]`` int32 device; cached tokens per request.
        start_loc: ``[B]`` int32 device; first row of each request in the packed tokens.
        seq_lens_cpu: ``[B]`` int32 host mirror.
        prefix_lens_cpu: ``[B]`` int32 host mirror.
    """

    seq_lens: Tensor
    prefix_lens: Tensor
    start_loc: Tensor
    seq_lens_cpu: Tensor
    prefix_lens_cpu: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One forward pass on the device.

    Tensors are views of the step's staging copy or of a graph's static slots; they belong to
    the runner and are valid until the next pass.

    Attributes:
        mode: Kind of pass.
        batch_size: B.
        input_ids: ``[T]`` int64 device.
        positions: ``[T]`` int64 device.
        req_pool_indices: ``[B]`` int32 device; rows of ``req_to_token``; 0 = padding.
        seq_lens: ``[B]`` int32 device; length after this pass, new tokens included.
        seq_lens_cpu: ``[B]`` int32 host mirror.
        out_cache_loc: ``[T]`` device integers; slot of each new token; 0 swallows padding.
        logits_rows: ``[R]`` int64 device; tokens whose logits are wanted; ``None`` = all.
        page_table: ``[B, max_pages]`` int32 device, where the attention asked for one.
        capture_hidden: Which hidden states to keep.
        extend: Present iff several new tokens per request are possible.
        prefix_chunks: Present iff attention walks a long cached prefix in chunks.
    """

    mode: ForwardMode
    batch_size: int
    input_ids: Tensor
    positions: Tensor
    req_pool_indices: Tensor
    seq_lens: Tensor
    seq_lens_cpu: Tensor
    out_cache_loc: Tensor
    logits_rows: Tensor | None = None
    page_table: Tensor | None = None
    capture_hidden: CaptureHiddenMode = CaptureHiddenMode.NULL
    extend: ExtendPart | None = None
    prefix_chunks: PrefixChunks | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.input_ids.shape[-1])

    def check(self) -> None:
        """Verify shapes and dtypes; for debug mode and tests.

        Raises:
            ContractError: Names every field that disagrees with the vocabulary.
        """
        faults = [fault for fault in _faults(self) if fault]
        if faults:
            raise ContractError(
                "ForwardBatch is malformed: " + "; ".join(faults) + ". This is a mistake of "
                "whoever built the batch; see docs/reference/vocabulary.md"
            )


def pad_tokens(batch: ForwardBatch, num_tokens: int) -> ForwardBatch:
    """The batch with so many rows; those behind its tokens belong to no request.

    They are token 0 at position 0, in slot 0.
    """
    missing = num_tokens - batch.num_tokens
    if missing <= 0:
        return batch
    rows = (batch.input_ids, batch.positions, batch.out_cache_loc)
    input_ids, positions, slots = (functional.pad(row, (0, missing)) for row in rows)
    return replace(batch, input_ids=input_ids, positions=positions, out_cache_loc=slots)


_DTYPES = {
    "input_ids": ("int64",),
    "positions": ("int64",),
    "req_pool_indices": ("int32",),
    "seq_lens": ("int32",),
    "seq_lens_cpu": ("int32",),
    "out_cache_loc": ("int32", "int64"),
    "logits_rows": ("int64",),
}


def _faults(batch: ForwardBatch) -> list[str]:
    faults = []
    for name, allowed in _DTYPES.items():
        tensor = getattr(batch, name)
        dtype = str(tensor.dtype).removeprefix("torch.") if tensor is not None else allowed[0]
        if dtype not in allowed:
            faults.append(f"{name} is {dtype}, expected {' or '.join(allowed)}")
    tokens, size = batch.num_tokens, batch.batch_size
    lengths = {
        "positions": (batch.positions.shape[-1], tokens),
        "out_cache_loc": (batch.out_cache_loc.shape[0], tokens),
        "req_pool_indices": (batch.req_pool_indices.shape[0], size),
        "seq_lens": (batch.seq_lens.shape[0], size),
        "seq_lens_cpu": (batch.seq_lens_cpu.shape[0], size),
    }
    faults += [f"{n} has {a} rows, expected {b}" for n, (a, b) in lengths.items() if a != b]
    if batch.seq_lens_cpu.device.type != "cpu":
        faults.append("seq_lens_cpu is not on the host")
    if batch.mode.is_decode() and tokens != size:
        faults.append(f"{tokens} tokens for {size} requests in decode")
    if batch.mode.is_extend() and batch.extend is None:
        faults.append(f"mode {batch.mode.name} without its extend part")
    return faults
