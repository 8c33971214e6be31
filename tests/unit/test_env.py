# SPDX-License-Identifier: Apache-2.0
"""Environment variables: values, defaults, and errors that name all three facts."""

from __future__ import annotations

import os

import pytest

from bedplate import env
from bedplate.errors import ConfigError


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        (env.BACKEND, "acme:1", "acme:1"),
        (env.BACKEND, "  ", None),
        (env.CONFIG, "/a/b.toml", "/a/b.toml"),
        (env.DEBUG, "1", True),
        (env.DEBUG, "ON", True),
        (env.DEBUG, "no", False),
        (env.DEBUG, "", False),
        (env.PLUGINS, "", env.PluginFilter()),
        (env.PLUGINS, "a, b", env.PluginFilter(allow=frozenset({"a", "b"}))),
        (env.PLUGINS, "none", env.PluginFilter(allow=frozenset())),
        (env.PLUGINS, "-a,", env.PluginFilter(block=frozenset({("a", None)}))),
        (env.PLUGINS, "-a@My_Dist.x", env.PluginFilter(block=frozenset({("a", "my-dist-x")}))),
        (env.PLUGINS, "none,-b",
         env.PluginFilter(allow=frozenset(), block=frozenset({("b", None)}))),
    ],
)  # fmt: skip
def test_values(variable, text, value):
    assert variable.get({variable.name: text}) == value
    assert variable.get({}) == variable.default


@pytest.mark.parametrize(
    ("variable", "text"),
    [(env.DEBUG, "maybe"), (env.PLUGINS, "A"), (env.PLUGINS, "a@b"), (env.PLUGINS, "none,a"),
     (env.PLUGINS, "--a"), (env.PLUGINS, "-a@")],
)  # fmt: skip
def test_errors_name_variable_value_and_forms(variable, text):
    with pytest.raises(ConfigError) as caught:
        variable.get({variable.name: text})
    for part in (variable.name, repr(text), variable.forms):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "home", "reason"),
    [
        ("", False, None),
        ("other", False, "BEDPLATE_PLUGINS allows only other"),
        ("none", False, "no plugins from outside bedplate were allowed"),
        ("none", True, None),
        ("-x", True, "blocked by BEDPLATE_PLUGINS=-x"),
        ("-x@d", False, "blocked by BEDPLATE_PLUGINS=-x@d"),
        ("-x@e", False, None),
    ],
)
def test_refusal(text, home, reason):
    allowed = env.PLUGINS.get({"BEDPLATE_PLUGINS": text})
    assert allowed.refusal("x", "d", home=home) == reason


def test_table_is_complete_and_documented():
    for name, variable in env.VARIABLES.items():
        assert name == variable.name
        assert name.startswith(env.PREFIX)
        assert variable.sentence.endswith(".")
        assert variable.forms
    public = {v.name for v in vars(env).values() if isinstance(v, env.Variable)}
    assert public == set(env.VARIABLES)


def test_process_environment_is_live_and_read_only(monkeypatch):
    monkeypatch.setenv("BEDPLATE_BACKEND", "x")
    assert env.BACKEND.get() == "x"
    with pytest.raises(TypeError):
        env.environment()["A"] = "b"
    monkeypatch.setenv("BEDPLATE_PLUGINS", "")
    env.set_plugins("none")
    assert os.environ["BEDPLATE_PLUGINS"] == "none"


def test_unknown_variables():
    found = env.unknown_variables({"BEDPLATE_BAKCEND": "x", "BEDPLATE_DEBUG": "1", "HOME": "/"})
    assert found == ("BEDPLATE_BAKCEND",)
