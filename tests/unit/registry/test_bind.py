# SPDX-License-Identifier: Apache-2.0
"""Stage 5 and the whole door, on fake backends found by real enumeration."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from bedplate.config import EngineConfig
from bedplate.contract import Decision, OpRequest, StepStats
from bedplate.errors import BackendError, ContractError, DeviceMemoryError
from bedplate.registry import DecisionLog, open_backend
from bedplate.registry.door import backend_request
from bedplate.registry.select import BackendRequest

REFERENCE = {"double": lambda x: 2 * x}


@pytest.fixture
def log():
    return DecisionLog()


@pytest.fixture
def open_fake(fakes, log):
    def go(text=None, config=None, **rest):
        request = BackendRequest(text=text, source="test") if text else None
        return open_backend(
            request, config=config or EngineConfig(), reference_ops=REFERENCE, decisions=log,
            path=fakes.path, **rest,
        )  # fmt: skip

    return go


STATS = StepStats(
    step=1, mode="DECODE", num_requests=1, num_tokens=1, graph=None, graph_reason="",
    host_us=1.0, total_us=1.0, free_tokens=1, queued=0,
)  # fmt: skip


def test_minimal_backend_is_bound(fakes, open_fake, log):
    fakes.backend("acme", probe="score=50, devices=(DeviceFacts(index=3, name='d'),)")
    config = EngineConfig(backend_options={"acme": {"a": 1}, "other": {"b": 2}})
    bound = open_fake(config=config, rank=1, world_size=2)
    request = fakes.module("acme").EVENTS[0]
    assert (request.device_index, request.rank, request.world_size) == (3, 1, 2)
    assert request.options == {"a": 1}
    assert (bound.name, bound.device_index, bound.config) == ("acme", 3, config)
    assert bound.runtime.device.type == bound.capabilities.device_type == "acmedev"
    for factory in (bound.make_kv_pool, bound.make_allocator, bound.make_graph_runner,
                    bound.compile, bound.after_load, bound.explain_error):  # fmt: skip
        assert factory(ValueError()) is None
    assert bound.ops.choose(OpRequest(op="double", dtype="float32")).provider == "reference"
    assert len(bound.attention_providers) == 0
    assert log.points() == ("backend", "op.double")
    assert not log.unexplained()
    with pytest.raises(dataclasses.FrozenInstanceError):
        bound.name = "x"
    bound.shutdown()
    bound.shutdown()
    assert fakes.module("acme").EVENTS[1:] == ["runtime", "shutdown"]


def test_every_hook_call_after_binding_raises(fakes, open_fake, monkeypatch):  # HW045
    from bedplate.registry import door

    kept = []
    inner = door.bind_backend
    monkeypatch.setattr(door, "bind_backend", lambda r, s: kept.append(s) or inner(r, s))
    fakes.backend("acme")
    bound = open_fake("acme")
    hooks = kept[0].hooks
    assert hooks.sealed
    for name in hooks.names:
        arguments = dict.fromkeys(getattr(hooks.manager.hook, name).spec.argnames)
        with pytest.raises(ContractError) as caught:
            getattr(hooks.manager.hook, name)(**arguments)
        assert caught.value.code == "HW045"
        assert name in str(caught.value)
    bound.make_kv_pool(None)
    bound.shutdown()  # needs no hook


def test_factories_are_plain_and_guarded(fakes, open_fake):
    fakes.backend(
        "acme", manifest="docs='http://docs'",
        extra="""
        @hookimpl
        def bedplate_make_kv_pool(self, request):
            if request == "ours": raise errors.DeviceMemoryError("too big")
            if request == "lib": raise ImportError("x.so: undefined symbol: y")
            if request: raise RuntimeError("vendor code 7")
            return object()
        @hookimpl
        def bedplate_make_graph_runner(self): return "runner"
        @hookimpl
        def bedplate_compile(self, request): return len
        @hookimpl
        def bedplate_after_load(self, model): model.append(1)
        @hookimpl
        def bedplate_explain_error(self, error):
            if "7" in str(error): return "Seven means full"
            if "8" in str(error): return 8
            raise ValueError
        """,
    )  # fmt: skip
    (source := fakes.root / "fake_acme.py").write_text(
        "from bedplate import errors\n" + source.read_text()
    )
    bound = open_fake("acme")
    with pytest.raises(BackendError) as caught:
        bound.make_kv_pool("big request")
    assert caught.value.code == "HW041"
    for part in ("bedplate_make_kv_pool", "vendor code 7", "big request", "Seven means full",
                 "http://docs"):  # fmt: skip
        assert part in str(caught.value)
    with pytest.raises(BackendError) as caught:
        bound.make_kv_pool("lib")
    assert caught.value.code == "HW021"
    with pytest.raises(DeviceMemoryError) as caught:
        bound.make_kv_pool("ours")
    assert any("bedplate_make_kv_pool" in note for note in caught.value.__notes__)
    with pytest.raises(ContractError) as caught:
        bound.make_kv_pool(None)
    assert caught.value.code == "HW044"
    assert bound.make_graph_runner("anything") == "runner"
    assert bound.compile("anything") is len
    bound.after_load(model := [])
    assert model == [1]
    assert bound.explain_error(ValueError("7")) == "Seven means full"
    assert bound.explain_error(ValueError("8")) is None
    assert bound.explain_error(ValueError("9")) is None


UNKNOWN_OP = """def bedplate_register_ops(self, registry):
    registry.register(OpProvider(op='duble', provider='acme', call=len))"""


@pytest.mark.parametrize(
    ("extra", "code", "text", "runtime"),
    [
        ("def bedplate_activate(self): 1/0", "HW041", "bedplate_activate", False),
        ("def bedplate_activate(self): raise OSError('undefined symbol: A_1')", "HW021",
         "A_1", False),
        ("def bedplate_activate(self): return None", "HW044", "NoneType", False),
        ("def bedplate_capabilities(self): 1/0", "HW041", "ZeroDivision", True),
        ("def bedplate_capabilities(self): return None", "HW044", "NoneType", True),
        (UNKNOWN_OP, "contract", "'double'", True),
        ("def bedplate_register_attention(self, register): register(1)", "contract",
         "not int", True),
        ("def bedplate_configure(self): raise SystemExit(1)", "HW041", "SystemExit", False),
        ("def bedplate_configure(self): return 1", "HW044", "int", False),
    ],
)  # fmt: skip
def test_failed_start_gives_everything_back(fakes, open_fake, extra, code, text, runtime):
    fakes.backend("acme", extra="@hookimpl\n" + extra)
    with pytest.raises(BackendError) as caught:
        open_fake("acme")
    assert caught.value.code == code
    assert text in str(caught.value)
    events = [e for e in fakes.module("acme").EVENTS if isinstance(e, str)]
    assert events == (["runtime", "shutdown"] if runtime else ["shutdown"])


def test_all_problems_of_capabilities_are_listed(fakes, open_fake):  # HW044
    fakes.backend(
        "acme",
        extra="@hookimpl\ndef bedplate_capabilities(self):\n    return BackendCapabilities("
        "device_type='other', compute_dtypes=(), kv_dtypes=(), determinism='sure',"
        "memory=MemoryCapabilities(page_sizes=(0,), index_dtype='int8'),"
        "graph=GraphCapabilities(default=True))",
    )
    with pytest.raises(ContractError) as caught:
        open_fake("acme")
    for part in ("'other'", "compute_dtypes", "kv_dtypes", "page_sizes", "int8", "sure",
                 "graph.default"):  # fmt: skip
        assert part in caught.value.problems


def test_shutdown_survives_plugins_that_raise(fakes, open_fake, caplog):
    fakes.backend("acme", extra="@hookimpl\ndef bedplate_shutdown(self): 1/0")
    fakes.plugin("watcher", hooks="@hookimpl\ndef bedplate_shutdown(self): SEEN.append(1)")
    fakes.backend("idle")
    open_fake("acme").shutdown()
    assert fakes.module("watcher").SEEN == [1]
    assert fakes.module("idle").EVENTS == ["shutdown"]
    assert "'acme' raised while shutting down" in caplog.text


def configured(proposals):
    return f"@hookimpl\ndef bedplate_configure(self, config): return {proposals}"


def test_proposals_fill_what_nobody_gave(fakes, open_fake, log):
    fakes.backend(
        "acme", extra=configured("{'page_size': (config['page_size'] or 16, 'tiles.'),"
                                 "'dtype': ('bfloat16', 'matrix unit'), 'seed': (1, 'x')}"
                                 .replace(", 'seed': (1, 'x')", "")),
    )  # fmt: skip
    bound = open_fake("acme", EngineConfig(dtype="float32"))
    assert (bound.config.page_size, bound.config.dtype) == (16, "float32")
    assert bound.config.source("page_size") == "backend acme"
    page, dtype = (d for d in log if d.point.startswith("config."))
    assert (page.chosen, [c.verdict for c in page.candidates]) == ("16", ["chosen", "possible"])
    assert (dtype.chosen, [c.verdict for c in dtype.candidates]) == (
        "float32", ["chosen", "refused"],
    )  # fmt: skip
    assert dtype.candidates[0].reason == "given by argument"
    assert not log.unexplained()


@pytest.mark.parametrize(
    ("proposals", "words"),
    [
        ("[1]", ["not a mapping"]),
        ("{'page_siz': (1, 'x'), 'model': ('m', 'x'), 'dtype': 'x', 'graphs': (True, '')}",
         ["Did you mean 'page_size'?", "'model' belongs to the user", "'dtype' is not proposed",
          "'graphs' is proposed without a reason"]),
        ("{'page_size': (-1, 'x')}", ["page_size is -1"]),
    ],
)  # fmt: skip
def test_bad_proposals_are_all_listed(fakes, open_fake, log, proposals, words):  # HW044
    fakes.backend("acme", extra=configured(proposals))
    with pytest.raises(ContractError) as caught:
        open_fake("acme")
    assert caught.value.code == "HW044"
    assert all(word in caught.value.problems for word in words)
    assert not log.unexplained()


PACK = """
@hookimpl
def bedplate_register_ops(self, registry):
    registry.register(OpProvider(op="double", provider="{name}", call=len, priority=200,
                                 kind="kernels"))
    {after}
"""


def test_override_packs(fakes, open_fake, log):
    fakes.backend("acme")
    fakes.plugin("bad", group="kernels", hooks=PACK.format(name="bad", after="1/0"))
    fakes.plugin("elsewhere", group="kernels", targets=("other",), hooks="1/1")
    fakes.plugin("needy", group="kernels", hooks="1/0")
    fakes.plugin("pack", group="kernels", targets=("acme",),
                 hooks=PACK.format(name="pack", after=""))  # fmt: skip
    fakes.plugin("quiet", group="kernels")
    bound = open_fake("acme")
    made = {d.point: d for d in log}
    assert [
        (name, made[f"pack.{name}"].candidates[0].verdict)
        for name in ("bad", "elsewhere", "needy", "pack", "quiet")
    ] == [("bad", "failed"), ("elsewhere", "refused"), ("needy", "failed"), ("pack", "chosen"),
          ("quiet", "chosen")]  # fmt: skip
    assert bound.ops.choose(OpRequest(op="double", dtype="x")).provider == "pack"
    verdicts = [(c.name, c.verdict) for c in list(log)[-1].candidates]
    assert verdicts == [("pack", "chosen"), ("reference", "possible")]
    assert not log.unexplained()


def test_blocked_pack_is_recorded_as_refused(fakes, open_fake, log, monkeypatch):
    monkeypatch.setenv("BEDPLATE_PLUGINS", "-pack")
    fakes.backend("acme")
    fakes.plugin("pack", group="kernels")
    open_fake("acme")
    assert list(log)[-1].candidates[0].verdict == "refused"


def test_observers_see_everything_and_harm_nothing(fakes, open_fake, log, caplog):
    fakes.backend("acme")
    fakes.plugin("watcher", hooks="""
        @hookimpl
        def bedplate_decision(self, decision): SEEN.append(decision.point)
        @hookimpl
        def bedplate_step_finished(self, stats): SEEN.append(stats.step)
        """.replace("\n        ", "\n"))  # fmt: skip
    fakes.plugin("broken", hooks="""
        @hookimpl
        def bedplate_decision(self): SEEN.append(0); 1/0
        @hookimpl
        def bedplate_step_finished(self): SEEN.append(1); 1/0
        """.replace("\n        ", "\n"))  # fmt: skip
    with caplog.at_level(logging.ERROR):
        bound = open_fake("acme")
        log.record(Decision(point="graph", chosen=None, candidates=()))
        for _ in range(2):
            for observe in bound.step_observers:
                observe(STATS)
    assert fakes.module("watcher").SEEN == ["backend", "graph", 1, 1]
    assert fakes.module("broken").SEEN == [0, 1]
    assert len(bound.decision_observers) == len(bound.step_observers) == 2
    assert "'broken' raised in step_finished" in caplog.text


def test_no_backend_still_leaves_its_decision(fakes, open_fake, log):
    fakes.home(extras=("acme",))
    fakes.backend("other", probe="score=77")
    with pytest.raises(BackendError) as caught:
        open_fake("acme")
    assert caught.value.code == "HW004"
    assert "Usable here: other" in str(caught.value)  # probed for the message's sake
    assert [d.chosen for d in log] == [None]
    assert not log.unexplained()


def test_a_named_backend_is_the_only_one_probed(fakes, open_fake):
    fakes.backend("acme")
    fakes.backend(
        "curious", extra="@hookimpl\ndef bedplate_probe(self): EVENTS.append('probed')"
    )
    open_fake("acme")
    assert fakes.module("curious").EVENTS == []


@pytest.mark.parametrize(
    ("config", "environ", "expected"),
    [
        (EngineConfig(), None, ("auto", "default")),
        (EngineConfig(), "x", ("x", "BEDPLATE_BACKEND")),
        (EngineConfig(backend="y"), "x", ("y", "argument")),
        (EngineConfig(backend="y", sources={"backend": "--backend"}), "x", ("y", "--backend")),
    ],
)
def test_order_of_sources(monkeypatch, config, environ, expected):
    monkeypatch.delenv("BEDPLATE_BACKEND", raising=False)
    if environ:
        monkeypatch.setenv("BEDPLATE_BACKEND", environ)
    request = backend_request(config)
    assert (request.text, request.source) == expected


def test_one_broken_plugin_never_hides_another(fakes, open_fake):
    """All kinds of broken plugins at once, and the good one still opens."""
    fakes.backend("boom", code="1/0")
    fakes.backend("exit", code="raise SystemExit")
    fakes.backend("liar", manifest="kind='plugin'")
    fakes.backend("typo", extra="@hookimpl\ndef bedplate_x(self): ...")
    fakes.backend("hung", extra="@hookimpl\ndef bedplate_probe(self): 1/0")
    fakes.backend("twin", distribution="twin-a")
    fakes.distribution("twin-b", entries="[bedplate.backends]\ntwin = m:x")
    fakes.distribution("odd", entries="[bedplate.backends]\nBAD = m:x")
    fakes.plugin("gone", hooks="1/0")
    fakes.backend("zgood")
    assert open_fake().name == "zgood"
    assert open_fake("boom,liar,typo,twin,hung,zgood").name == "zgood"
