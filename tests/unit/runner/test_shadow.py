# SPDX-License-Identifier: Apache-2.0
"""A second backend names the first part of a pass that gave something else."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from bedplate import Engine, SamplingParams, demo
from bedplate.cli.main import cli
from bedplate.config import resolve_config
from bedplate.contract import OpProvider
from bedplate.errors import BackendNotFoundError, ConfigError
from bedplate.reference.attention import ReferenceAttention, reference_provider
from bedplate.reference.ops import OPERATIONS, rms_norm
from bedplate.runner import shadow as module
from bedplate.runner import startup
from bedplate.runner.shadow import Shadow

PROMPTS = ["What is 12 + 30?", "Once upon a time there was", "a"]


@pytest.fixture(autouse=True)
def no_collections(monkeypatch):
    """One at each start would be a good part of the time of these tests."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.fixture
def open_engine(monkeypatch):
    """An engine whose first backend got some implementations more; the shadow did not."""
    monkeypatch.setenv("BEDPLATE_PLUGINS", "none")
    engines = []

    def go(*providers, attention=None, dtype="float32", **settings):
        honest = startup.open_backend

        def opened(**arguments):
            bound = honest(**arguments)
            for provider in providers:
                bound.ops.register(provider)
            if attention is not None:
                bound.attention_providers.register(attention)
            return bound

        monkeypatch.setattr(startup, "open_backend", opened)
        settings = {"max_context_len": 128, "max_total_tokens": 1024} | settings
        arguments = {"backend": "cpu", "shadow": "cpu", "dtype": dtype, **settings}
        engines.append(Engine.from_config(resolve_config(arguments)))
        monkeypatch.setattr(startup, "open_backend", honest)
        return engines[-1]

    yield go
    for engine in engines:
        engine.close()


def generate(engine, count=6):
    engine.generate(PROMPTS, SamplingParams(max_tokens=count, ignore_eos=True))
    return engine.shadow


def planted(op, call):
    return OpProvider(op=op, provider="planted", call=call, priority=300)


@pytest.mark.parametrize(("dtype", "page_size"), [("float32", 1), ("bfloat16", 16)])
def test_equal_backends_agree_part_by_part(open_engine, dtype, page_size):
    engine = open_engine(
        dtype=dtype, attention=replace(reference_provider, name="other", priority=900),
        page_size=page_size, chunked_prefill_tokens=16,
    )  # fmt: skip
    report = generate(engine)
    assert (report.checked, report.diverged, report.first) == (report.steps, 0, None)
    assert 0 < report.margin < 1
    assert report.closest.endswith(".attention")


def test_fused_layers_leave_sums_to_each_other_and_are_compared_whole(open_engine, monkeypatch):
    ops = ("linear", "norm_linear", "act_and_mul", "add_norm", "qk_norm_rope_write")
    engine = open_engine(*(planted(op, OPERATIONS[op]) for op in ops))
    assert engine.runner.model.bridge.trims
    fused = [d.point for d in engine.decisions if d.chosen == "fused"]
    assert sum(point.endswith(".layer") for point in fused) == 6
    parts = []
    compare = module._gaps

    def spied(leader, own):
        for part, gap in compare(leader, own):
            parts.append(part)
            yield part, gap

    monkeypatch.setattr(module, "_gaps", spied)
    report = generate(engine)
    assert report.first is None
    assert {f"model.layers.{n}" for n in range(6)} | {"model.norm", "lm_head"} <= set(parts)
    assert "model.layers.3.self_attn.queries" in parts
    assert "model.layers.3.mlp" not in parts  # swallowed by the layer
    assert engine.runner.model.bridge.trims, "the last layer leaves out tokens again"


def test_a_kernel_that_is_wrong_in_one_place_is_named(open_engine):
    weights = load_file(demo.path() / "model.safetensors")
    target = weights["model.layers.3.input_layernorm.weight"].float()

    def norm(x, weight, eps, order):
        out = rms_norm(x, weight, eps, order)
        live = x.shape[-2] not in (1, 3, 8)  # not what verification tries
        return out * 1.01 if live and torch.equal(weight.float(), target) else out

    report = generate(open_engine(planted("rms_norm", norm)))
    assert report.first.part == "model.layers.3.input_layernorm"
    assert (report.first.step, report.first.mode) == (1, "EXTEND")
    assert "by planted" in report.first.served_by
    assert "model.layers.3.input_layernorm (fused: " in str(report)
    assert report.diverged == 1  # decode passes have no more than three rows


def test_attention_that_is_wrong_in_decode_is_named(open_engine):
    class Wrong(ReferenceAttention):
        def forward_decode(self, q, k, v, call, batch, *, sinks=None):
            out = super().forward_decode(q, k, v, call, batch, sinks=sinks)
            return out if call.call_id != 4 else out.flip(-1)

    wrong = replace(reference_provider, name="wrong", priority=900, build=Wrong)
    report = generate(open_engine(attention=wrong))
    assert report.first.part == "model.layers.4.self_attn.attention"
    assert report.first.mode == "DECODE"
    assert report.diverged == report.steps - 1


def test_a_share_of_the_passes_is_enough_whatever_was_missed(open_engine):
    engine = open_engine(shadow_rate=0.25, page_size=8)
    report = generate(engine, 16)
    assert (report.steps, report.checked) == (16, 4)
    assert report.first is None
    assert str(report).startswith("shadow cpu: 4 of 16 steps checked; none diverged")


@pytest.mark.parametrize(("rate", "wanted"), [(1.0, 100), (0.5, 50), (0.01, 1), (0.3, 30)])
def test_the_rate_is_kept(rate, wanted):
    shadow = object.__new__(Shadow)
    shadow._rate, shadow._credit, shadow.report = rate, 1.0, module.ShadowReport(name="x")
    due = [shadow.due() for _ in range(100)]
    assert due[0]
    assert abs(sum(due) - wanted) <= 1


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [("MOST_NEW_TOKENS", 4, "more than 4 new tokens"), ("MOST_TOKENS", 16, "tokens in all")],
)
def test_what_is_too_large_is_run_without_the_shadow_and_counted(
    open_engine, monkeypatch, limit, value, reason
):
    monkeypatch.setattr(module, limit, value)
    report = generate(open_engine())
    assert any(reason in why for why in report.skipped)
    assert "skipped" in str(report)
    assert report.checked + sum(report.skipped.values()) == report.steps


def test_answers_are_those_of_the_first_backend_and_hooks_go_away(open_engine):
    engine = open_engine()
    watched = [o.token_ids for o in engine.generate(PROMPTS, SamplingParams(max_tokens=8))]
    assert not any(m._forward_hooks for m in engine.runner.model.module.modules())
    engine.close()
    alone = open_engine(shadow=None)
    assert alone.shadow is None
    assert [
        o.token_ids for o in alone.generate(PROMPTS, SamplingParams(max_tokens=8))
    ] == watched


@pytest.mark.parametrize(
    ("name", "error"),
    [("auto", ConfigError), ("cpu,cuda", ConfigError), ("nobody", BackendNotFoundError)],
)
def test_a_shadow_is_one_backend_that_is_there(open_engine, name, error):
    with pytest.raises(error, match=name.split(",")[0]):
        open_engine(shadow=name)


def test_the_command_reports_and_its_exit_status_tells(monkeypatch):
    monkeypatch.setenv("BEDPLATE_PLUGINS", "none")
    arguments = ["generate", "--backend", "cpu", "--shadow", "cpu", "-n", "3", "-p", "Hello"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert "shadow cpu: 3 of 3 steps checked; none diverged" in done.stderr
