# SPDX-License-Identifier: Apache-2.0
"""Find launch sizes: time every candidate on the large cases of an operation.

    python -m benchmarks.tune linear decode_attention --json tuned.json [--only WORD]

Candidates are compiled by many processes first, without the device; those that do not fit are
dropped.  The result lists, for each case, its key and the best candidates with their times;
``kernels/bedplate_triton/configs`` is written from it by hand, with the provenance that is
printed.  Nothing is tuned while serving.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton

from bedplate_triton import configs
from bedplate_triton.cases import Case, all_cases, relative_error
from benchmarks.compiling import compile_all
from benchmarks.device import device_features, measure_ceilings, recorded_us

if TYPE_CHECKING:
    from bedplate_triton.features import Features

_ENOUGH_BYTES = 192 << 20
_MOST_COPIES = 8

Candidate = dict[str, Any]


def product(**choices: list[Any]) -> list[Candidate]:
    return [
        dict(zip(choices, values, strict=True))
        for values in itertools.product(*choices.values())
    ]


def linear_space(key: Candidate) -> list[Candidate]:
    rows, size = key["m"], key["k"]
    found: list[Candidate] = [{"form": "torch"}]
    if rows <= 4:
        found += [
            {"form": "gemv", **each}
            for each in product(
                rows=[1, 2, 4] if not key["act"] else [2, 4],
                chunk=[1024, 2048] if size > 1024 else [512, 1024],
                tiles=[1, 2], depth=[2, 4], num_warps=[4, 8], fuse=[True, False],
            )
            if (key["norm"] or each["fuse"])
            and (each["fuse"] or each["depth"] == 4)
            and each["chunk"] >= 256 * each["num_warps"]
            and each["tiles"] * size // each["chunk"] <= 32
        ]  # fmt: skip
    if 2 <= rows <= 64:
        found += [
            {"form": "skinny", **each}
            for each in product(
                block_n=[32, 64], block_k=[128, 256], splits=[1, 2, 4],
                swap=[False, True], early=[1], num_stages=[4, 6], num_warps=[4],
            )
            if (key["n"] // each["block_n"] * each["splits"] <= 800 or each["splits"] == 1)
            and each["num_stages"] * each["block_n"] * each["block_k"] <= 6 * 64 * 128
        ]  # fmt: skip
    return found


def decode_attention_space(key: Candidate) -> list[Candidate]:
    tiles = (
        [(32, 4), (64, 4), (64, 8), (128, 8)] if key["head_dim"] <= 128 else [(16, 8), (32, 8)]
    )
    few = key["batch"] <= 16
    more = [2, 3, 4] if key["batch"] < 32 else [3, 6, 9, 16]
    found = [
        {"BLOCK_N": block, "num_warps": warps, **each}
        for block, warps in tiles
        for each in product(
            num_stages=[2, 3],
            programs_a_core=more,
            merge=["kernel", "last"] if few else ["kernel"],
            tokens_a_split=[64, 256] if few else [128],
        )
    ]
    return found + [
        {**each, "options": {"maxnreg": 128}} for each in found if each["BLOCK_N"] == 128
    ]


def extend_attention_space(_key: Candidate) -> list[Candidate]:
    return product(
        BLOCK_M=[64, 128], BLOCK_N=[32, 64, 128], num_warps=[4, 8], num_stages=[2, 3]
    )


def invariant_space(_key: Candidate) -> list[Candidate]:
    return product(
        BLOCK_M=[64, 128], BLOCK_N=[32, 64, 128], BLOCK_K=[64, 128], num_warps=[4, 8],
        num_stages=[3, 4],
    )  # fmt: skip


def norm_space(_key: Candidate) -> list[Candidate]:
    return product(num_warps=[2, 4, 8, 16])


def rope_space(_key: Candidate) -> list[Candidate]:
    return product(heads=[1, 2, 4, 8], num_warps=[1, 2, 4])


def gated_space(_key: Candidate) -> list[Candidate]:
    return product(columns=[256, 512, 1024, 2048], num_warps=[2, 4, 8])


SPACES = {
    "linear": linear_space,
    "decode_attention": decode_attention_space,
    "extend_attention": extend_attention_space,
    "invariant": invariant_space,
    "norm": norm_space,
    "rope": rope_space,
    "gated": gated_space,
}


class _Asked(Exception):  # noqa: N818 - not an error
    """Carries the key with which a configuration was asked for."""


def key_of(case: Case, file: str, features: Features) -> Candidate | None:
    """What the case asks ``choose`` for, of this file; ``None`` if it never does."""

    def ask(op: str, features: Any, **key: Any) -> Candidate:
        if op == file:
            raise _Asked(key)
        return original(op, features, **key)

    original, configs.choose = configs.choose, ask
    run, triton.runtime.JITFunction.run = triton.runtime.JITFunction.run, _launch_nothing
    try:
        case.run(case.make(torch.device("meta"), 0), features)
    except _Asked as asked:
        return dict(asked.args[0])
    except Exception:
        return None
    finally:
        configs.choose = original
        triton.runtime.JITFunction.run = run
    return None


def _launch_nothing(*_args: Any, **_options: Any) -> None:
    """In place of launches on tensors without memory."""


def time_candidates(
    case: Case, file: str, candidates: list[Candidate], features: Any
) -> list[tuple[float, Candidate]]:
    """Times of all candidates that run and are right, best first."""
    device = torch.device("cuda")
    copies = max(1, min(_MOST_COPIES, _ENOUGH_BYTES // max(case.nbytes, 1) + 1))
    inputs = [case.make(device, seed) for seed in range(copies)]
    want = case.reference(case.make(device, 99)) if case.nbytes < 2 << 30 else None
    found: list[tuple[float, Candidate]] = []
    for candidate in candidates:
        try:
            with configs.override(file, **candidate):
                if want is not None:
                    got = case.run(case.make(device, 99), features)
                    errors = [relative_error(g, w) for g, w in zip(got, want, strict=True)]
                    if max(errors) > case.tolerance:
                        print(f"  WRONG {candidate}: {max(errors):.1e}")
                        continue
                calls = [lambda i=i: case.timed(i, features) for i in inputs]
                found.append((recorded_us(calls, 10), candidate))
        except Exception as error:
            print(f"  fails {candidate}: {type(error).__name__}: {str(error)[:90]}")
    return sorted(found, key=lambda pair: pair[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", choices=SPACES)
    parser.add_argument("--only", default="", help="labels with one of these words, by comma")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=400)
    options = parser.parse_args()
    begin = time.perf_counter()
    features = device_features()
    words = options.only.split(",")
    work = [
        (file, case, key)
        for file in options.files
        for case in all_cases(small=False)
        if any(word in case.label for word in words)
        and (key := key_of(case, file, features)) is not None
    ]
    jobs = [
        (file, case.label, candidate)
        for file, case, key in work
        for candidate in SPACES[file](key)
    ]
    faults = compile_all(jobs, features)
    pairs = zip(jobs, faults, strict=True)
    broken = {(file, label, repr(c)) for (file, label, c), fault in pairs if fault}
    seconds = time.perf_counter() - begin
    print(f"{len(jobs)} candidates, {len(broken)} do not compile, {seconds:.0f} s")
    print(*sorted({fault for fault in faults if fault})[:6], sep="\n")
    ceilings = measure_ceilings()
    print(ceilings)
    rows = []
    for file, case, key in work:
        if time.perf_counter() - begin > options.seconds:
            print("out of time before", case.label)
            break
        candidates = [c for c in SPACES[file](key) if (file, case.label, repr(c)) not in broken]
        best = time_candidates(case, file, candidates, features)
        floor = ceilings.floor_us(case.nbytes, case.flops)
        print(f"{case.label} {key} floor {floor:.1f} us")
        for microseconds, candidate in best[:4]:
            print(
                f"   {microseconds:9.2f} us {floor / microseconds:4.0%} {candidate}", flush=True
            )
        for microseconds in [us for us, each in best if each.get("form") == "torch"]:
            print(f"   {microseconds:9.2f} us torch")
        rows.append({"case": case.label, "key": key, "floor_us": floor, "best": best[:12]})
        torch.cuda.empty_cache()
    provenance = {"how": "measured", "device": ceilings.device,
                  "date": datetime.now(UTC).date().isoformat()}  # fmt: skip
    if options.json is not None:
        options.json.write_text(json.dumps({"provenance": provenance, "cases": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
