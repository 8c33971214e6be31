# SPDX-License-Identifier: Apache-2.0
"""What every backend whose device torch calls ``cuda`` does with graphs on it."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from bedplate.batch.forward_mode import CaptureHiddenMode
from bedplate.contract import GraphRunnerRequest
from bedplate.testing.tiny_decoder import TinyAttention, TinyDecoder, decode_batch


class GraphsOnDevice:
    """Inherit these tests beside a fixture ``runtime`` and a fixture ``kind``, the runner."""

    @pytest.fixture(scope="class")
    def bench(self, runtime, kind):
        attention = TinyAttention(device="cuda")
        model = TinyDecoder(attention, device="cuda")
        decisions = []
        request = GraphRunnerRequest(
            runtime=runtime,
            forward=model,
            attention=attention,
            capture_sizes=(1, 4, 16),
            hidden_modes=(CaptureHiddenMode.NULL,),
            index_dtype="int32",
            record=decisions.append,
        )
        runner = kind(request)
        runner.capture()
        assert decisions == []
        return SimpleNamespace(
            runner=runner, attention=attention, model=model, request=request, kind=kind
        )

    @pytest.mark.parametrize(
        "lengths", [[1], [12], [3, 4], [5, 1, 9], [2] * 4, [*range(1, 12)]]
    )
    def test_replay_equals_eager(self, bench, lengths):
        compare(bench, bench.runner, lengths)

    def test_capture_again_after_release(self, bench):
        """A trial capture is released and its pool used again, as a start-up does."""
        runner = bench.kind(dataclasses.replace(bench.request, capture_sizes=(2,)))
        for lengths in ([3], [4, 5]):
            runner.capture()
            assert runner.captured
            compare(bench, runner, lengths)
            runner.release()

    def test_failing_capture_is_recorded_and_the_next_one_works(self, bench):
        def waits(batch):
            output = bench.model(batch)
            if torch.cuda.is_current_stream_capturing() and batch.batch_size == 4:
                output.next_token_logits.sum().item()
            return output

        decisions = []
        runner = bench.kind(
            dataclasses.replace(bench.request, forward=waits, record=decisions.append)
        )
        runner.capture()
        assert [decision.point for decision in decisions] == ["graph.4"]
        assert [key.batch_size for key in runner.captured] == [16, 1]
        compare(bench, runner, [2])
        torch.empty(64 << 20, dtype=torch.uint8, device="cuda")  # free at once, and cached
        cached = torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= cached - (64 << 20)

    def test_results_of_all_graphs_share_their_memory(self, bench):
        """A bucket's results keep no memory that the next one could use."""

        def wide(batch):
            output = bench.model(batch)
            logits = output.next_token_logits.repeat(1, 4 << 20)  # 512 MiB a row
            return dataclasses.replace(output, next_token_logits=logits)

        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        runner = bench.kind(
            dataclasses.replace(bench.request, forward=wide, capture_sizes=(1, 2, 3))
        )
        runner.capture()
        taken = (torch.cuda.memory_reserved() - before) / (1 << 29)
        assert taken < 4.5, f"{taken:.2f} times 512 MiB; of their own they would take 6"
        batch = decode_batch([3, 4], bench.attention)
        with torch.no_grad():
            logits = runner.replay(batch).next_token_logits
            bench.attention.prepare_in_graph(batch)
            expected = bench.model(batch).next_token_logits
        assert logits.shape == (2, 32 * (4 << 20))
        torch.testing.assert_close(logits[:, -32:], expected, atol=1e-4, rtol=1e-4)
        runner.release()


def compare(bench, runner, lengths):
    """A replay and an eager pass give the same logits."""
    batch = decode_batch(lengths, bench.attention)
    with torch.no_grad():
        assert runner.can_run(batch)
        replayed = runner.replay(batch).next_token_logits.clone()
        bench.attention.prepare_in_graph(batch)
        expected = bench.model(batch).next_token_logits
    torch.testing.assert_close(replayed, expected, atol=1e-4, rtol=1e-4)
