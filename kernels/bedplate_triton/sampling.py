# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N803 - constants are capitals
"""From logits to tokens in two launches, whatever the rows of a batch ask for.

The first launch reads the logits once: it keeps the maximum of each block of a row, and where
the row is random also the block's weight. The second has one program a row. A greedy row
merges its blocks and is done. A random row without filters finds the block in which the
cumulative weight crosses its uniform number, and reads only that. A row with filters finds
the lowest logit that stays by bisection over integers that are ordered like the logits, so
nothing is sorted; the maxima of the blocks bound it from below, and so the bisection mostly
runs over the few candidates above that bound.

Weights are ``exp(logit / T − best / T)`` in float32 with quotients rounded as torch rounds
them; sums are in another order. Nothing is atomic: the same input gives the same token.

Shapes: S rows that sample, V vocabulary, N blocks, R request rows.
"""

from __future__ import annotations

__all__ = ["sample_tokens"]

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from bedplate.errors import ContractError, UnsupportedError
from bedplate.reference import sampling as reference
from bedplate_triton import configs
from bedplate_triton.sizes import cdiv, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

    from bedplate.reference.sampling import SamplingTables
    from bedplate_triton.features import Features

NOT_A_NUMBER = tl.constexpr(reference.NOT_A_NUMBER)

_LOWEST = {
    torch.bfloat16: ~0x7F80,
    torch.float16: ~0x7C00,
    torch.float32: ~0x7F800000,
}
"""Key of minus infinity: see ``_key``."""
_NOWHERE = tl.constexpr(2**31 - 1)
"""Behind every place."""
_LOST = tl.constexpr(-1)
"""Before every place: of a block that holds what is not a number."""
_ROUNDING = tl.constexpr(0.99)
"""Share of a bound that must hold in spite of sums in another order."""


def sample_tokens(
    logits: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    tables: SamplingTables,
    last_tokens: Tensor,
    *,
    features: Features,
) -> Tensor:
    """See ``bedplate.reference.sampling.sample_tokens``; two launches, nothing waits.

    Args:
        logits: ``[S, V]`` bfloat16, float16 or float32, adjacent in the last dimension.
        rows: ``[S]`` int32. Padding, row 0, is sampled as the row says, and races for its
            last token.
        seq_lens: ``[S]`` int32.
        tables: ``[R]`` each.
        last_tokens: ``[R]`` int64, written.
        features: The device.

    Returns:
        ``[S]`` int64, new.

    Raises:
        ContractError: The numbers of rows differ, or numbers are not adjacent.
        UnsupportedError: Logits of another dtype.
    """
    _check(logits, rows, seq_lens, tables, last_tokens)
    size, vocabulary = logits.shape
    tokens = torch.empty(size, dtype=torch.int64, device=logits.device)
    if size == 0:
        return tokens
    # Only GROUP may depend on the rows: all else orders sums, and then the same row would not
    # give the same token in every batch.
    sizes = configs.choose("sampling", features, rows=power_of_two(size))
    blocks = cdiv(vocabulary, sizes["BLOCK"])
    peaks = logits.new_empty((size, blocks))
    places = torch.empty((size, blocks), dtype=torch.int32, device=logits.device)
    sums = torch.empty((size, blocks), dtype=torch.float32, device=logits.device)
    _blocks_kernel[(cdiv(blocks, sizes["GROUP"]), size)](
        logits, rows, tables.temperature, peaks, places, sums, logits.stride(0),
        V=vocabulary, BLOCK=sizes["BLOCK"], GROUP=sizes["GROUP"],
        num_warps=sizes["block_warps"], **features.chain.arguments(),
    )  # fmt: skip
    candidates = logits.new_empty((size, sizes["ROOM"]))
    candidate_places = torch.empty_like(candidates, dtype=torch.int32)
    _rows_kernel[(size,)](
        logits, rows, seq_lens, tables.temperature, tables.top_k, tables.top_p, tables.min_p,
        tables.seed, peaks, places, sums, candidates, candidate_places, tokens, last_tokens,
        logits.stride(0), vocabulary, blocks,
        LOWEST=_LOWEST[logits.dtype], BLOCK=sizes["BLOCK"],
        BLOCK_N=power_of_two(blocks), TILE=sizes["TILE"], ROOM=sizes["ROOM"],
        num_warps=sizes["row_warps"], **features.chain.arguments(),
    )  # fmt: skip
    return tokens


def _check(
    logits: Tensor, rows: Tensor, seq_lens: Tensor, tables: SamplingTables, last_tokens: Tensor
) -> None:
    if logits.dtype not in _LOWEST:
        raise UnsupportedError(
            f"sample_tokens takes logits in float32 or narrower, not {logits.dtype}; cast them"
        )
    size = len(logits)
    if rows.shape != (size,) or seq_lens.shape != (size,):
        raise ContractError(
            f"sample_tokens got {size} rows of logits, {list(rows.shape)} request rows and "
            f"{list(seq_lens.shape)} lengths; pass one each for every row"
        )
    flat = (
        rows, seq_lens, tables.temperature, tables.top_k, tables.top_p, tables.min_p,
        tables.seed, last_tokens,
    )  # fmt: skip
    if logits.stride(1) != 1 or not all(each.is_contiguous() for each in flat):
        raise ContractError("sample_tokens takes numbers that are adjacent; pass no steps")


@triton.jit(do_not_specialize_on_alignment=["rows"])
def _blocks_kernel(
    logits, rows, temperatures, peaks, places, sums, logits_s,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Maximum, its first place and, for random rows, the weight of ``GROUP`` blocks."""
    RELEASE()
    WAIT()
    row = tl.program_id(1).to(tl.int64)
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    block = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + row * logits_s + place, mask=place < V, other=float("-inf"))
    temperature = tl.load(temperatures + tl.load(rows + row))
    x = x.to(tl.float32)
    peak = tl.max(x, 1)
    first = tl.where(x == peak[:, None], place, _NOWHERE)
    first = tl.min(tl.where(x != x, _LOST, first), 1)
    real = block < blocks
    target = row * blocks + block
    tl.store(peaks + target, peak.to(peaks.dtype.element_ty), mask=real)
    tl.store(places + target, first, mask=real)
    if temperature > 0:
        # The peak decides about a block of nothing but -inf, or with an infinity.
        finite = tl.abs(peak) < float("inf")
        x = tl.where(finite[:, None], x, 0.0)
        inverse = tl.div_rn(1.0, temperature)
        own = _quotient(tl.where(finite, peak, 0.0), temperature, inverse)
        weight = _weight(x, (temperature, inverse, own[:, None]))
        tl.store(sums + target, tl.sum(weight, 1), mask=real)


# Where rows may begin anywhere, neighbouring threads read neighbouring logits. That is how
# they are compacted and added up in order; several to a thread would be exchanged first.
@triton.jit(
    do_not_specialize=["logits_s", "V", "N"],
    do_not_specialize_on_alignment=["rows", "seq_lens"],
)
def _rows_kernel(
    logits, rows, seq_lens, temperatures, top_ks, top_ps, min_ps, seeds,
    peaks, places, sums, candidates, candidate_places, tokens, last_tokens, logits_s,
    V, N, LOWEST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
    TILE: tl.constexpr, ROOM: tl.constexpr, WAIT: tl.constexpr, RELEASE: tl.constexpr,
):  # fmt: skip
    """Choose the token of one row."""
    RELEASE()
    WAIT()
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCK_N)
    real = block < N
    peak = tl.load(peaks + row * N + block, mask=real, other=float("-inf")).to(tl.float32)
    place = tl.load(places + row * N + block, mask=real, other=_NOWHERE)
    request = tl.load(rows + row)
    temperature = tl.load(temperatures + request)
    best = tl.max(peak, 0)
    token = tl.min(tl.where((peak == best) | (place == _LOST), place, _NOWHERE), 0)
    lost = token == _LOST
    if temperature > 0:
        lost = lost | (tl.abs(best) == float("inf"))
        if not lost:
            inverse = tl.div_rn(1.0, temperature)
            heat = (temperature, inverse, _quotient(best, temperature, inverse))
            lost = not (tl.abs(heat[2]) < float("inf"))
            mass = tl.load(sums + row * N + block, mask=real, other=0.0) * _weight(peak, heat)
            token = _draw(
                logits + row * logits_s, peaks + row * N, mass, best, heat,
                _uniform(tl.load(seeds + request), tl.load(seq_lens + row)),
                tl.load(top_ks + request), tl.load(top_ps + request),
                tl.load(min_ps + request), candidates + row * ROOM,
                candidate_places + row * ROOM, V, N, LOWEST, BLOCK, BLOCK_N, TILE, ROOM,
            )  # fmt: skip
    token = tl.where(lost, NOT_A_NUMBER, token).to(tl.int64)
    tl.store(tokens + row, token)
    tl.store(last_tokens + request, tl.maximum(token, 0))


@triton.jit
def _draw(
    logits, peaks, mass, best, heat, u, top_k, top_p, min_p,
    candidates, candidate_places, V, N, LOWEST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Token of a random row whose blocks weigh ``mass``.

    With or without filters: where to look, what stays there, and the weight to pass.
    """
    dtype: tl.constexpr = logits.dtype.element_ty
    total = tl.sum(mass, 0)
    k = tl.where(top_k > 0, top_k, V)
    if (k < V) | (top_p < 1.0) | (min_p > 0.0):
        limit = tl.where(top_p < 1.0, top_p * total, float("inf"))
        highest = _key(best.to(dtype))
        # Maxima of blocks are tokens too: what these few drop is dropped. And tokens too
        # light to fill together what top-p leaves out are all behind it.
        light = tl.maximum(min_p, (1.0 - top_p) * total / V * _ROUNDING)
        lowest = tl.full([], LOWEST, tl.int32)
        floor, _, _ = _lowest_that_stays(
            peaks, N, lowest, highest, k, limit, light, heat, BLOCK_N
        )
        count = _collect(logits, floor, candidates, candidate_places, V, TILE, ROOM)
        collected = count <= ROOM
        # Branches carry addresses: of pointers not every compiler can tell where they point.
        address, stop = logits.to(tl.int64), V
        if collected:
            address, stop = candidates.to(tl.int64), count
        source = address.to(logits.dtype)
        bound, above, weight_above = _lowest_that_stays(
            source, stop, floor, highest, k, limit, min_p, heat, TILE
        )
        # Of equals the first stay: as many as top-k and top-p leave room for.
        from_bound, _ = _above(source, stop, bound - 1, heat, TILE)
        weight = _weight(_value(bound, dtype), heat)
        spare = (limit - weight_above) / tl.where(weight > 0, weight, 1.0)
        room = tl.minimum(tl.ceil(tl.minimum(spare, V)).to(tl.int32), k - above)
        equals = tl.minimum(tl.maximum(room, 1), from_bound - above)
        target = u * (weight_above + equals * weight)
        start = 0
    else:
        collected = False
        address, bound, equals = logits.to(tl.int64), LOWEST - 1, 0
        goal = u * total
        block = tl.arange(0, BLOCK_N)
        heavy = mass > 0
        crossed = tl.min(tl.where((tl.cumsum(mass, 0) > goal) & heavy, block, _NOWHERE), 0)
        crossed = tl.minimum(crossed, tl.max(tl.where(heavy, block, 0), 0))
        target = goal - tl.sum(tl.where(block < crossed, mass, 0.0), 0)
        start = crossed * BLOCK
        stop = tl.minimum(start + BLOCK, V)
    source = address.to(logits.dtype)
    token = _invert(source, start, stop, bound, equals, target, heat, TILE)
    if collected:
        token = tl.load(candidate_places + token)
    return token


@triton.jit
def _lowest_that_stays(
    source, length, low, high, k, limit, least, heat, TILE: tl.constexpr
):  # fmt: skip
    """Key of the lowest logit whose first token stays, by bisection of ``low … high``.

    A token stays if fewer than ``k`` tokens and less than ``limit`` weight are above it and
    it weighs ``least`` itself; the best, ``high``, stays anyhow.

    Returns:
        The key, number and weight of the tokens above it.
    """
    dtype: tl.constexpr = source.dtype.element_ty
    count = 0
    mass = 0.0
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, which cannot overflow
        above, weight_above = _above(source, length, middle, heat, TILE)
        weight = _weight(_value(middle, dtype), heat)
        stays = (above < k) & (weight_above < limit) & (weight >= least)
        count = tl.where(stays, above, count)
        mass = tl.where(stays, weight_above, mass)
        high = tl.where(stays, middle, high)
        low = tl.where(stays, low, middle + 1)
    return high, count, mass


@triton.jit
def _above(source, length, bound, heat, TILE: tl.constexpr):
    """Number and weight of the logits whose keys are above ``bound``."""
    count = tl.zeros([TILE], tl.int32)
    mass = tl.zeros([TILE], tl.float32)
    for start in range(0, length, TILE):
        place = start + tl.arange(0, TILE)
        inside = place < length
        x = tl.load(source + place, mask=inside, other=float("-inf"))
        higher = inside & (_key(x) > bound)
        count += higher.to(tl.int32)
        mass += tl.where(higher, _weight(x.to(tl.float32), heat), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _collect(
    logits, floor, candidates, candidate_places, V,
    TILE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Copy the logits from the key ``floor`` on, and their places, in order.

    Returns:
        How many there are; if more than ``ROOM``, only that there are more.
    """
    count = 0
    start = 0
    while (start < V) & (count <= ROOM):
        place = start + tl.arange(0, TILE)
        inside = place < V
        x = tl.load(logits + place, mask=inside, other=float("-inf"))
        chosen = inside & (_key(x) >= floor)
        rank = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
        written = chosen & (rank < ROOM)
        tl.store(candidates + rank, x, mask=written)
        tl.store(candidate_places + rank, place, mask=written)
        count += tl.sum(chosen.to(tl.int32), 0)
        start += TILE
    # What one thread wrote, another reads.
    tl.debug_barrier()
    return count


@triton.jit
def _invert(
    source, start, stop, bound, equals, target, heat, TILE: tl.constexpr
):  # fmt: skip
    """First place from ``start`` on at which the weight of what stays exceeds ``target``.

    Keys above ``bound`` stay, and the first ``equals`` of those that equal it. If rounding
    leaves the target behind the end, it is the last place that weighs anything.
    """
    found = _NOWHERE
    last = 0
    mass = 0.0
    seen = 0
    while (start < stop) & (found == _NOWHERE):
        place = start + tl.arange(0, TILE)
        inside = place < stop
        x = tl.load(source + place, mask=inside, other=float("-inf"))
        key = _key(x)
        equal = inside & (key == bound)
        early = seen + tl.cumsum(equal.to(tl.int32), 0) <= equals
        stays = inside & ((key > bound) | (equal & early))
        weight = tl.where(stays, _weight(x.to(tl.float32), heat), 0.0)
        heavy = weight > 0
        crossed = (mass + tl.cumsum(weight, 0) > target) & heavy
        found = tl.min(tl.where(crossed, place, _NOWHERE), 0)
        last = tl.maximum(last, tl.max(tl.where(heavy, place, 0), 0))
        mass += tl.sum(weight, 0)
        seen += tl.sum(equal.to(tl.int32), 0)
        start += TILE
    return tl.minimum(found, last)


@triton.jit
def _weight(x, heat):
    """Weight of logits; ``heat`` is T, 1 / T and the quotient whose weight is one."""
    return tl.exp(_quotient(x, heat[0], heat[1]) - heat[2])


@triton.jit
def _quotient(x, temperature, inverse):
    """``x / temperature``, rounded correctly as long as it is finite; -inf stays what it is.

    Shorter than a division that serves every divisor: one step of refinement suffices, as the
    inverse is rounded correctly.
    """
    quotient = tl.maximum(x * inverse, -1e30)
    rest = tl.fma(-quotient, temperature, x)
    return tl.fma(rest, inverse, quotient)


@triton.jit
def _key(x):
    """Integers in the order of the numbers; both zeros are one."""
    if x.dtype.primitive_bitwidth == 16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
        key = bits ^ ((bits >> 31) & 0x7FFF)
    else:
        bits = x.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(key == -1, 0, key)


@triton.jit
def _value(key, dtype: tl.constexpr):
    """The float32 of a key of ``dtype``."""
    if dtype.primitive_bitwidth == 16:
        bits = (key ^ ((key >> 31) & 0x7FFF)).to(tl.int16)
    else:
        bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _uniform(seed, position):
    """As ``bedplate.reference.sampling.uniform``: 24 bits of a hash, below 1."""
    position = position.to(tl.int64).to(tl.uint64, bitcast=True)
    mixed = _mix(position + 0x9E3779B97F4A7C15)
    mixed = _mix(seed.to(tl.uint64, bitcast=True) + mixed)
    return (mixed >> 40).to(tl.int32).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def _mix(x):
    """The finalizer of splitmix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
