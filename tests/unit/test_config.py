# SPDX-License-Identifier: Apache-2.0
"""EngineConfig: what is accepted, what is refused, and where values come from."""

from __future__ import annotations

import dataclasses

import pytest

from bedplate.config import EngineConfig, load_config_file, resolve_config, setting_names
from bedplate.errors import ConfigError

WRONG = {
    "model": "", "tokenizer": 5, "backend": "", "attention": True, "dtype": "b f",
    "kv_dtype": None, "page_size": 0, "max_context_len": -1, "max_running_requests": 1.5,
    "max_total_tokens": True, "mem_fraction": 1.5, "chunked_prefill_tokens": None,
    "mixed": 1, "deterministic": 0, "prefix_cache": None, "graphs": "yes",
    "capture_sizes": (4, 2), "capture_tokens": [16], "fusion": "all",
    "load_format": "pickle", "overlap": 1, "seed": -1, "trust_remote_code": "no", "debug": 0,
    "backend_options": {"cpu": 1}, "shadow": "", "shadow_rate": 0.0,
}  # fmt: skip


def test_defaults_are_fine_and_nothing_is_given():
    config = EngineConfig()
    assert set(config.flat()) == set(setting_names())
    assert not any(config.flat().values())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dtype = "float32"


@pytest.mark.parametrize("name", setting_names())
def test_each_setting_is_validated(name):
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{name: WRONG[name]})
    assert f"{name} is {WRONG[name]!r}" in str(caught.value)
    assert "must be" in str(caught.value)


def test_all_offenders_are_listed_with_their_source():
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**WRONG, sources={"seed": "/x.toml"})
    assert len(caught.value.problems) == len(WRONG) == len(setting_names())
    assert "seed is -1 (from /x.toml)" in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"capture_sizes": (1, 2, 8)}, {"mem_fraction": 1}, {"mem_fraction": 0.5},
        {"seed": 2**63 - 1}, {"graphs": False}, {"capture_sizes": ()},
        {"capture_tokens": ()},
        {"backend_options": {"cpu": {"threads": 4}}}, {"dtype": "bfloat16"},
    ],
)  # fmt: skip
def test_accepted(settings):
    config = EngineConfig(**settings)
    (name,) = settings
    assert config.given(name)
    assert config.source(name) == "argument"
    assert config.flat()[name] == settings[name]


@pytest.mark.parametrize("value", ["capture_sizes=(True,)", "mem_fraction=True"])
def test_truth_is_no_number(value):
    name, _, literal = value.partition("=")
    with pytest.raises(ConfigError):
        EngineConfig(**{name: eval(literal)})


def test_what_counts_as_given():
    assert not EngineConfig(dtype="auto").given("dtype")
    assert not EngineConfig(dtype="auto", sources={"dtype": "--dtype"}).given("dtype")
    assert not EngineConfig(seed=0).given("seed")
    assert EngineConfig(seed=0, sources={"seed": "--seed"}).given("seed")
    assert EngineConfig(graphs=False).given("graphs")
    assert EngineConfig().source("seed") == "default"


def test_order_of_sources(tmp_path):
    file = tmp_path / "b.toml"
    file.write_text(
        'backend = "f"\nseed = 5\ncapture_sizes = [1, 2]\n[backend_options.f]\nx = 1\n'
    )
    environ = {"BEDPLATE_CONFIG": str(file)}

    def backend(arguments, **rest):
        config = resolve_config(arguments, **rest)
        return config.backend, config.source("backend")

    assert backend({}, environ={}) == (None, "default")
    assert backend({}, environ=environ) == ("f", str(file))
    environ["BEDPLATE_BACKEND"] = "e"
    assert backend({"backend": None}, environ=environ) == ("e", "BEDPLATE_BACKEND")
    assert backend({"backend": "a"}, environ=environ) == ("a", "argument")
    assert backend({"backend": "a"}, options=True, environ=environ) == ("a", "--backend")
    config = resolve_config({"page_size": 4}, options=True, environ=environ)
    assert config.source("page_size") == "--page-size"
    assert (config.seed, config.capture_sizes) == (5, (1, 2))
    assert config.backend_options == {"f": {"x": 1}}
    other = tmp_path / "c.toml"
    other.write_text("seed = 6")
    assert resolve_config({}, path=other, environ=environ).seed == 6


def test_a_file_in_the_working_folder_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "bedplate.toml").write_text("trust_remote_code = true")
    monkeypatch.chdir(tmp_path)
    assert resolve_config({}, environ={}) == EngineConfig()


def test_unknown_settings_are_all_named(tmp_path):
    file = tmp_path / "b.toml"
    file.write_text("page_siz = 1\nzzz = 2\n")
    with pytest.raises(ConfigError) as caught:
        load_config_file(file)
    assert "'page_siz' (did you mean 'page_size'?)" in str(caught.value)
    assert "'zzz'" in str(caught.value)
    with pytest.raises(ConfigError, match="the arguments"):
        resolve_config({"sources": {}}, environ={})


@pytest.mark.parametrize("content", [None, b"= 1", b"\xff"])
def test_unreadable_file(tmp_path, content):
    file = tmp_path / "b.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="Cannot read the configuration file"):
        load_config_file(file)
