# SPDX-License-Identifier: Apache-2.0
"""Launch sizes come from files: the most specific folder, its first rules that hold."""

from __future__ import annotations

import json
from importlib import resources

import pytest

from bedplate.errors import ContractError
from bedplate_triton import configs
from bedplate_triton.configs import ConfigFile, choose, find, override
from bedplate_triton.features import Features

FOLDER = resources.files("bedplate_triton") / "configs"
FILES = sorted(
    f"{folder.name}/{file.name}" for folder in FOLDER.iterdir() for file in folder.iterdir()
)


def file(*rules, **default):
    return ConfigFile(folder="x", op="op", default=default, rules=rules, provenance={})


def test_the_first_rule_that_holds_wins_for_each_value():
    made = file(
        ({"size_le": 64}, {"a": 1}),
        ({"size_ge": 32, "kind": "long"}, {"a": 2, "b": 2}),
        ({"size": 100}, {"b": 3, "c": 3}),
        a=0, b=0, c=0,
    )  # fmt: skip
    assert made.choose({"size": 64, "kind": "long"}) == {"a": 1, "b": 2, "c": 0}
    assert made.choose({"size": 100, "kind": "long"}) == {"a": 2, "b": 2, "c": 3}
    assert made.choose({"size": 100, "kind": "short"}) == {"a": 0, "b": 3, "c": 3}
    assert made.choose({}) == {"a": 0, "b": 0, "c": 0}


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_whole(name):
    folder, _, rest = name.partition("/")
    op = rest.removesuffix(".json")
    found = find(op, folder)
    assert found.folder == folder
    assert found.default.keys() == find(op, "").default.keys()
    assert all(values.keys() <= found.default.keys() for _, values in found.rules)
    assert found.provenance["how"] in ("compile-only", "measured")
    assert found.provenance["how"] == "compile-only" or found.provenance["device"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Write ``{folder: default}`` for the operation ``op`` and use them alone."""
    monkeypatch.setattr(configs.resources, "files", lambda _package: tmp_path)
    configs._files.cache_clear()
    configs._chosen.cache_clear()

    def write(**made):
        for folder, default in made.items():
            place = tmp_path / "configs" / folder.replace("_at_", "@")
            place.mkdir(parents=True)
            data = {"schema": 1, "op": "op", "default": default, "provenance": {}}
            (place / "op.json").write_text(json.dumps(data))
        return tmp_path / "configs"

    yield write
    configs._files.cache_clear()
    configs._chosen.cache_clear()


def test_the_most_specific_folder_counts_alone(folders):
    folders(default={"a": 0}, sm_90={"a": 1}, sm_90_at_Some_Card={"a": 2})
    assert choose("op", Features(arch="sm_80")) == {"a": 0}
    assert choose("op", Features(arch="sm_90", device="Other")) == {"a": 1}
    assert choose("op", Features(arch="sm_90", device="Some-Card")) == {"a": 2}


def test_no_file_at_all_is_an_error(folders):
    folders(sm_90={"a": 1})
    with pytest.raises(ContractError, match="default"):
        choose("op", Features(arch="sm_80"))


WHOLE = '{"schema": 1, "op": "op", "default": {}, "provenance": {}}'


@pytest.mark.parametrize(
    "text", ["{", "{}", WHOLE.replace("1", "2"), WHOLE.replace('"op",', '"other",')]
)
def test_a_broken_file_is_named(folders, text):
    (folders(default={}) / "default" / "op.json").write_text(text)
    with pytest.raises(ContractError, match="default/op"):
        choose("op", Features())


def test_overrides_hold_inside_a_block(folders):
    folders(default={"a": 0, "b": 0})
    with override("op", a=5):
        with override("op", b=6):
            assert choose("op", Features()) == {"a": 5, "b": 6}
        assert choose("op", Features()) == {"a": 5, "b": 0}
    assert choose("op", Features()) == {"a": 0, "b": 0}


def test_an_override_of_some_uses_leaves_the_others_alone(folders):
    folders(default={"a": 0})
    with override("op", {"size_le": 8}, a=1), override("op", {"size": 4}, a=2):
        assert [choose("op", Features(), size=size)["a"] for size in (4, 8, 9)] == [2, 1, 0]
