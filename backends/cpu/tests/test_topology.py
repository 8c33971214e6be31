# SPDX-License-Identifier: Apache-2.0
"""Which cores a rank gets (function 85), on machines that we only describe."""

from __future__ import annotations

import pytest
import torch

from bedplate.contract import ActivateRequest, ProbeRequest
from bedplate.errors import ConfigError
from bedplate_cpu import native, topology
from bedplate_cpu.attention import providers
from bedplate_cpu.plugin import backend
from bedplate_cpu.runtime import CpuRuntime, capabilities


def host(nodes=((0, 1, 2, 3), (4, 5, 6, 7)), allowed=range(8), flags=()):
    return topology.Host(
        model_name="test", arch="x86_64-v3", flags=frozenset(flags), nodes=nodes,
        allowed=frozenset(allowed), memory_bytes=1 << 30,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "rank", "world", "allowed", "cores"),
    [
        ("all", 0, 1, range(8), (0, 1, 2, 3, 4, 5, 6, 7)),
        ("all", 0, 2, range(8), (0, 1, 2, 3)),
        ("all", 1, 2, range(8), (4, 5, 6, 7)),
        ("all", 0, 1, (2, 3, 5), (2, 3, 5)),  # within the process's affinity
        ("0-1|4,6", 0, 2, range(8), (0, 1)),
        ("0-1|4,6", 1, 2, range(8), (4, 6)),
        ("none", 0, 1, range(8), ()),
    ],
)
def test_cores_of_a_rank(setting, rank, world, allowed, cores):
    machine = host(allowed=allowed)
    assert topology.bind_cores(machine, setting, rank=rank, world_size=world) == cores


@pytest.mark.parametrize(
    ("setting", "rank", "world", "allowed", "said"),
    [
        ("all", 2, 3, range(8), "2"),  # more ranks than nodes
        ("0-1", 1, 2, range(8), "rank 1 is missing"),
        ("all", 1, 2, range(4), "No core is left"),
        ("a-b", 0, 1, range(8), "not a core"),
    ],
)
def test_bindings_that_cannot_be_are_refused(setting, rank, world, allowed, said):
    with pytest.raises(ConfigError, match=said):
        topology.bind_cores(host(allowed=allowed), setting, rank=rank, world_size=world)


def test_only_the_first_thread_of_each_core_counts():
    machine = topology.read()
    cores = [core for node in machine.nodes for core in node]
    assert cores
    assert len(cores) == len(set(cores))


def test_the_runtime_gives_threads_back():
    before = torch.get_num_threads()
    runtime = CpuRuntime(ActivateRequest(options={"threads": "0"}))
    assert torch.get_num_threads() == 1
    runtime.shutdown()
    assert torch.get_num_threads() == before


def test_whoever_set_the_thread_count_is_obeyed():
    before = torch.get_num_threads()
    runtime = CpuRuntime(ActivateRequest(environment={"OMP_NUM_THREADS": "1"}))
    assert torch.get_num_threads() == before
    assert runtime.cores == ()
    runtime.shutdown()


def test_unknown_options_are_refused():
    with pytest.raises(ConfigError, match="thread"):
        CpuRuntime(ActivateRequest(options={"treads": "all"}))


@pytest.mark.parametrize(
    ("flags", "best"),
    [(("amx_bf16",), "bfloat16"), (("avx512_bf16",), "bfloat16"), (("avx2",), "float32")],
)
def test_bfloat16_is_preferred_where_it_is_native(flags, best):
    assert capabilities(host(flags=flags)).compute_dtypes[0] == best


def test_memory_is_shared_between_ranks():
    whole, half = (
        CpuRuntime(ActivateRequest(world_size=n, options={"threads": "none"})) for n in (1, 2)
    )
    assert half.memory().total_bytes == whole.memory().total_bytes // 2
    whole.shutdown()
    half.shutdown()


def test_the_probe_needs_no_device_and_tells_what_it_sees():
    answer = backend.bedplate_probe(ProbeRequest())
    assert 1 <= answer.score <= 99, "host class"
    assert answer.devices[0].memory_bytes > 0
    assert {item.name for item in backend.bedplate_environment_report()} == set(answer.facts)


def test_without_a_compiler_the_gathering_attention_is_left_and_says_why(monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda _name: None)
    native.load.cache_clear()
    try:
        kernels = native.load()
        assert kernels.library is None
        assert "no C compiler" in kernels.reason
        refused = providers()[0].supports(None)
        assert not refused
        assert "no C compiler" in refused.reason
    finally:
        native.load.cache_clear()


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho sorry, no >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(native.shutil, "which", lambda _name: str(fake))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load.cache_clear()
    try:
        assert "sorry, no" in native.load().reason
        assert not list(tmp_path.glob("bedplate/cpu/*.so")), "nothing half-made is kept"
    finally:
        native.load.cache_clear()
