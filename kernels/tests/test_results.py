# SPDX-License-Identifier: Apache-2.0
"""Results without their memory: the same numbers, and the memory goes to who comes next."""

from __future__ import annotations

import pytest
import torch
from kernels.tests.pools import Pool, as_tensor

from bedplate.batch.logits import LogitsOutput
from bedplate_triton.results import borrow

INTERFACE = "__cuda_array_interface__"


@pytest.fixture(autouse=True)
def pool(monkeypatch):
    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    return Pool()


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool,
     torch.float8_e5m2],
    ids=str,
)  # fmt: skip
def test_numbers_type_and_strides_stay(pool, dtype):
    wide = pool.place(draw(5, 16, dtype=dtype))
    kept = LogitsOutput(next_token_logits=wide[1:4, ::2])
    lent = borrow(kept, INTERFACE).next_token_logits
    assert (lent.dtype, lent.shape, lent.stride()) == (dtype, (3, 8), (16, 2))
    assert lent.data_ptr() == kept.next_token_logits.data_ptr()
    assert torch.equal(lent.float(), kept.next_token_logits.float())


def test_memory_of_all_of_them_is_given_back(pool):
    own = pool.place_results(
        LogitsOutput(
            next_token_logits=draw(4, 8),
            hidden_states=draw(4, 2),
            tokens=torch.arange(4, dtype=torch.int32),
        )
    )
    lent = borrow(own, INTERFACE)
    assert lent.hidden_states.data_ptr() == own.hidden_states.data_ptr()
    assert lent.tokens.tolist() == [0, 1, 2, 3]
    address, taken = own.next_token_logits.data_ptr(), pool.most_bytes
    del own
    assert pool.place(draw(4, 10)).data_ptr() == address
    assert pool.most_bytes == taken


def test_what_is_not_there_stays_away(pool):
    lent = borrow(LogitsOutput(next_token_logits=pool.place(draw(1, 3))), INTERFACE)
    assert (lent.hidden_states, lent.tokens) == (None, None)
