# SPDX-License-Identifier: Apache-2.0
"""The part of the attention contract that is code: dispatch, aliases, defaults."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bedplate.batch.forward_mode import ForwardMode
from bedplate.contract import AttentionBackend, AttentionCallSpec

CALL = AttentionCallSpec(
    call_id=3, module="m", num_heads=4, num_kv_heads=2, head_dim=8, value_dim=6, scale=1.0
)


class Recorder(AttentionBackend):
    def prepare(self, batch):
        self.prepared = batch

    def forward_extend(self, q, k, v, call, batch, *, sinks=None):
        return "extend"

    def forward_decode(self, q, k, v, call, batch, *, sinks=None):
        return "decode"


@pytest.mark.parametrize("mode", list(ForwardMode))
def test_dispatch_by_mode(mode):
    q = torch.zeros(0 if mode is ForwardMode.IDLE else 2, 4, 8)
    out = Recorder().forward(q, None, None, CALL, SimpleNamespace(mode=mode))
    if mode is ForwardMode.IDLE:
        assert out.shape == (0, 4, 6)
    else:
        assert out == ("decode" if mode is ForwardMode.DECODE else "extend")


def test_defaults_are_conservative():
    attention = Recorder()
    assert attention.seq_len_fill_value == 1
    assert attention.graph_key(None) == ()
    assert attention.prepare_in_graph(None) is None


def test_an_alias_reads_what_another_call_stored():
    assert CALL.cache_id == 3
    assert replace(CALL, alias_of=1).cache_id == 1
