# SPDX-License-Identifier: Apache-2.0
"""Every launch of every case compiled for every architecture, within what the device has.

What lies in ``kernels/matrix/golden`` was compiled from the sources as they are, which the
default run checks by their hashes, and that all of it is within its budget.  What has changed
since is compiled here too, for one architecture of each vendor, so that whoever works on a
kernel hears of a spill before anything is renewed.
"""

from __future__ import annotations

import copy
import json
import re

import pytest
import triton
from kernels.matrix import golden as goldens
from kernels.matrix import sources
from kernels.matrix.budget import problems
from kernels.matrix.golden import Golden
from kernels.matrix.targets import TARGETS
from kernels.tests.offline import compile_cases, run_offline

from bedplate_triton.cases import case_modules

MODULES = case_modules()
KEPT = goldens.load(triton.__version__)
FIRST = ("sm_90", "gfx942")
ARCHS = [pytest.param(a, marks=[] if a in FIRST else pytest.mark.slow) for a in TARGETS]


@pytest.mark.parametrize("arch", ARCHS)
def test_what_has_changed_is_within_its_budget(arch):
    made = copy.deepcopy(KEPT)
    stale = made.stale(arch, MODULES)
    made.put(arch, stale, compile_cases(arch, stale))
    found = [
        p
        for name in stale
        for facts in made.facts(arch, name)
        for p in problems(arch, facts, made.triton)
    ]
    assert found == []


@pytest.mark.parametrize("version", goldens.VERSIONS)
def test_what_is_kept_was_compiled_from_the_sources_as_they_are(version):
    assert goldens.why_stale(goldens.load(version), MODULES) == ""


def test_a_result_of_other_sources_says_what_to_do():
    kept = goldens.load("3.6.0")
    kept.sources["gfx942"]["rope"] = kept.sources["sm_90"]["norm"] = "0" * 16
    assert goldens.why_stale(kept, MODULES) == (
        "what is kept of Triton 3.6.0 was compiled from other sources: norm for sm_90; "
        "rope for gfx942. Run scripts/compile_matrix --triton 3.6.0 --write"
    )


def test_the_oldest_the_pinned_and_the_newest_triton_are_kept():
    pinned = re.search(r"^triton==(.+)$", (sources.ROOT / "constraints.txt").read_text(), re.M)
    assert pinned[1] in goldens.VERSIONS
    assert {f.stem for f in goldens.FOLDER.iterdir()} == {
        f"triton-{version}" for version in goldens.VERSIONS
    }


@pytest.mark.parametrize("version", goldens.VERSIONS)
def test_every_kernel_that_is_launched_is_kept(version):
    package = sources.ROOT / "kernels/bedplate_triton"
    launched = {
        name
        for path in package.glob("*.py")
        for name in re.findall(r"^ +(_\w+)\[.*\]\($", path.read_text(encoding="utf-8"), re.M)
    }
    assert {"_split_kernel", "_write_tokens", "_gemv"} <= launched
    rows = goldens.load(version).rows
    for arch in TARGETS:
        kernels = {row.partition(" of ")[0] for each in rows[arch].values() for row in each}
        assert kernels == launched


def test_the_tables_of_the_docs_are_of_what_is_kept():
    text = goldens.PAGE.read_text(encoding="utf-8")
    assert text == goldens.page(goldens.load(version) for version in goldens.VERSIONS)


@pytest.mark.parametrize("version", goldens.VERSIONS)
def test_what_is_kept_is_whole_and_within_its_budget(version):
    kept = goldens.load(version)
    assert kept.rows.keys() == TARGETS.keys()
    assert all(rows.keys() == set(MODULES) for rows in kept.rows.values())
    found = [
        problem
        for arch, rows in kept.rows.items()
        for name in rows
        for facts in kept.facts(arch, name)
        for problem in problems(arch, facts, version)
    ]
    assert found == []


CHOOSE = """
import json, torch, triton
from kernels.matrix.targets import TARGETS
from bedplate_triton import configs
from bedplate_triton.cases import all_cases

triton.runtime.JITFunction.run = lambda *_arguments, **_options: None
devices = [target.features() for target in TARGETS.values()]
for case in all_cases():
    inputs = case.make(torch.device("meta"), 0)
    for features in devices:
        if case.runs_on(features):
            case.run(inputs, features)
print(json.dumps([str(refused) for refused in configs.refusals()]))
"""


def test_sizes_of_an_architecture_fit_it():
    """For every case of every architecture; nothing is compiled."""
    assert run_offline("-c", CHOOSE) == [[]]


FINE = {
    "module": "decode_attention", "kernel": "_split_kernel", "case": "decode_attention: plain",
    "narrow": True, "warps": 4,
    "shared": 16384, "registers": 120, "stack": 0, "occupancy": 4, "estimate": 20000,
    "matrix": ["v_mfma_f32_16x16x16_bf16"],
}  # fmt: skip


LATENT = {"case": "decode_attention: x, latent 128 of 576"}
AT_A_STEP = {"matrix": ["mma"], "registers": 128}


@pytest.mark.parametrize(
    ("arch", "change", "problem"),
    [
        ("gfx942", {}, ""),
        ("gfx942", {"shared": 66560, "estimate": None}, "66,560 bytes shared of 65,536"),
        ("gfx950", {"shared": 66560, "estimate": None}, ""),
        ("gfx942", {"warps": 32}, "32 warps of 64 threads"),
        ("gfx1100", {"warps": 32}, ""),
        ("gfx942", {"stack": 4}, "4 bytes spilled, allowed are 0"),
        ("gfx942", {"kernel": "_extend_kernel", "stack": 512}, ""),
        ("gfx942", {"kernel": "_extend_kernel", "stack": 516}, "allowed are 512"),
        ("gfx1100", LATENT | {"stack": 2048}, ""),
        ("gfx942", LATENT | {"stack": 2048}, "allowed are 0"),
        ("gfx1100", LATENT | {"kernel": "_extend_kernel", "stack": 2180}, "allowed are 2,048"),
        ("sm_90", LATENT | {"matrix": ["wgmma"], "stack": 296}, "allowed are 0"),
        ("sm_120", AT_A_STEP | {"stack": 32}, ""),
        ("sm_120", AT_A_STEP | {"stack": 40}, "allowed are 32"),
        ("sm_120", AT_A_STEP | {"registers": 120, "stack": 8}, "allowed are 0"),
        ("gfx942", {"occupancy": 0}, "not one program fits"),
        ("gfx942", {"matrix": []}, "no matrix instruction"),
        ("gfx942", {"matrix": [], "narrow": False}, ""),
        ("gfx942", {"matrix": [], "kernel": "_merge_kernel"}, ""),
        ("gfx942", {"estimate": 16000}, "validator reckons with 16,000"),
        ("sm_90", {"kernel": "_extend_kernel", "case": "extend_attention: prompt of 4096",
                   "matrix": ["mma"]}, "wgmma expected"),
        ("sm_90", {"kernel": "_extend_kernel", "case": "extend_attention: prompt of 4096",
                   "matrix": ["wgmma"]}, ""),
    ],
)  # fmt: skip
def test_budgets(arch, change, problem):
    found = list(problems(arch, FINE | change, "3.7.1"))
    assert len(found) == bool(problem)
    assert all(problem in each and arch in each for each in found)


@pytest.mark.parametrize(
    ("arch", "change"),
    [
        ("gfx1100", {"kernel": "_extend_kernel", "stack": 2180}),
        ("sm_90", {"matrix": ["wgmma"], "registers": 255, "stack": 296}),
    ],
)
def test_what_only_the_newest_triton_spills_is_allowed_to_it_alone(arch, change):
    facts = FINE | LATENT | change
    assert list(problems(arch, facts, "3.9.0")) == []
    for version in ("3.6.0", "3.7.1"):
        assert "spilled, allowed are" in "".join(problems(arch, facts, version))


@pytest.mark.parametrize(
    ("arch", "use", "warps"),
    [
        ("sm_90", {"registers": 128, "shared": 0, "warps": 4}, 4),
        ("sm_90", {"registers": 32, "shared": 0, "warps": 4}, 16),
        ("sm_90", {"registers": 32, "shared": 200 << 10, "warps": 8}, 2),
        ("gfx942", {"registers": 120, "shared": 16384, "warps": 4}, 4),
        ("gfx942", {"registers": 260, "shared": 0, "warps": 4}, 1),
        ("gfx942", {"registers": 32, "shared": 33 << 10, "warps": 4}, 1),
        ("gfx942", {"registers": 32, "shared": 65 << 10, "warps": 4}, 0),
        ("gfx1100", {"registers": 240, "shared": 16384, "warps": 4}, 6),
    ],
)
def test_occupancy(arch, use, warps):
    assert TARGETS[arch].occupancy(**use) == warps


@pytest.mark.parametrize(
    ("arch", "assembly", "found"),
    [
        ("sm_90", "wgmma.mma_async.sync.aligned.m64n8k16 x;", ["wgmma"]),
        ("sm_80", "mma.sync.aligned.m16n8k16.row.col x;", ["mma"]),
        ("sm_100", "tcgen05.mma.cta_group::1.kind::f16 x;", ["tcgen05"]),
        (
            "gfx942",
            "v_mfma_f32_16x16x32_fp8_fp8 v[0:3]\nv_add v0",
            ["v_mfma_f32_16x16x32_fp8_fp8"],
        ),
        ("gfx1201", "v_wmma_f32_16x16x16_bf16 v[0:7]", ["v_wmma_f32_16x16x16_bf16"]),
        ("gfx942", "v_dot2_f32_bf16 v0", []),
    ],
)
def test_instructions_for_products_are_seen(arch, assembly, found):
    assert TARGETS[arch].instructions(assembly) == found


FIGURES = (
    "warps 4, shared 16384, registers 120, stack 0, occupancy 4, "
    "matrix ['v_mfma_f32_16x16x16_bf16'], narrow True, estimate 20000"
)


def test_a_change_can_be_read():
    before, after = Golden(triton="3"), Golden(triton="3")
    gone = FINE | {"kernel": "_merge_kernel"}
    come = FINE | {"case": "decode_attention: new"}
    before.put("gfx942", ["decode_attention"], [FINE, gone])
    after.put("gfx942", ["decode_attention"], [FINE | {"shared": 32768, "stack": 8}, come])
    assert list(goldens.differences(before, after)) == [
        "- gfx942: _merge_kernel of decode_attention: plain",
        "+ gfx942: _split_kernel of decode_attention: new: " + FIGURES,
        "! gfx942: _split_kernel of decode_attention: plain: shared 16384 → 32768, stack 0 → 8",
    ]


def test_a_file_comes_back_as_it_was_and_its_table_has_the_worst(tmp_path, monkeypatch):
    monkeypatch.setattr(goldens, "FOLDER", tmp_path)
    kept = goldens.load("3")
    assert kept == Golden(triton="3")
    worse = FINE | {"registers": 200, "occupancy": 2}
    kept.put("gfx942", ["decode_attention"], [FINE, worse])
    goldens.save(kept)
    back = goldens.load("3")
    assert back == kept
    assert [facts["registers"] for facts in back.facts("gfx942", "decode_attention")] == [
        120,
        200,
    ]
    assert back.stale("gfx942", ["decode_attention", "rope"]) == ["rope"]
    assert "| `_split_kernel` | – | – | – | – | – | 16,384 · 200 · 0 · 2 |" in goldens.table(
        back
    )


def names(arch, module):
    """Files that a hash is made of."""
    seen = []
    digest = sources.hashlib.sha256

    class Spy:
        def __init__(self):
            self.real = digest()

        def update(self, data):
            seen.append(data)

        def hexdigest(self):
            return "0" * 64

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.hashlib, "sha256", Spy)
        sources.source_hash(arch, module)
    return {data.decode() for data in seen[::2]}


PROSE = '''
"""Of a module."""
import a  # why
SIZE = 3
"""Of an attribute."""


def f(x):
    """Of a function.

    Of several lines.
    """
    return "# text" if x else """more"""
'''


def test_prose_is_not_compiled():
    assert sources._code(PROSE) == (
        'import a\nSIZE = 3\ndef f(x):\n    return "# text" if x else """more"""'
    )


def test_where_sizes_come_from_is_not_compiled(tmp_path):
    def meaning(**change):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"default": {"a": 1}, "provenance": "x", **change}))
        return sources._meaning(path)

    assert meaning() == meaning(provenance="y")
    assert meaning() != meaning(default={"a": 2})
    assert meaning() != meaning(rules=[{"when": {}, "set": {"a": 2}}])


def test_a_hash_is_of_all_that_a_launch_is_compiled_from_and_of_no_more():
    found = names("gfx942", "decode_attention")
    package = "kernels/bedplate_triton/"
    assert {package + name for name in (
        "cases/decode_attention.py", "decode_attention.py", "features.py", "sizes.py",
        "configs/cdna/decode_attention.json", "configs/default/decode_attention.json",
    )} <= found  # fmt: skip
    assert "backends/rocm/bedplate_rocm/architectures.py" in found
    assert not {name for name in found if "linear" in name or "sm_90" in name or "rdna" in name}
    assert package + "configs/sm_90/decode_attention.json" in names("sm_90", "decode_attention")


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("slices", [8])
def test_programs_of_a_key_head_share_a_slice(kv_heads, slices):
    """Grids of attention: key heads vary fastest, and programs are dealt to slices in turn."""
    requests, tiles = 5, 3
    for first in (kv_heads, tiles * kv_heads):  # decode, and several new tokens
        used = {head: set() for head in range(kv_heads)}
        for program in range(first * requests):
            used[program % first % kv_heads].add(program % slices)
        assert all(len(places) <= max(1, slices // kv_heads) for places in used.values())
