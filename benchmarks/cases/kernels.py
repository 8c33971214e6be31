# SPDX-License-Identifier: Apache-2.0
"""Every large case of every kernel against the device's ceilings.

    python -m benchmarks.cases.kernels [--only WORD] [--json FILE]

Each case is recorded in a graph over several inputs that together exceed the cache, and
replayed; the share is that of the least time in which its bytes and operations can be done.
Torch's own time for the same is printed where there is an operation for it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from benchmarks.compiling import compile_all
from benchmarks.device import Ceilings, device_features, measure_ceilings, recorded_us

from bedplate_triton.cases import all_cases, relative_error

if TYPE_CHECKING:
    from bedplate_triton.cases import Case
    from bedplate_triton.features import Features

_ENOUGH_BYTES = 256 << 20
_MOST_COPIES = 12


def measure(case: Case, features: Features, ceilings: Ceilings) -> dict[str, Any]:
    """Time and error of one case."""
    device = torch.device("cuda")
    copies = max(1, min(_MOST_COPIES, _ENOUGH_BYTES // max(case.nbytes, 1) + 1))
    inputs = [case.make(device, seed) for seed in range(copies)]
    microseconds = recorded_us([lambda i=i: case.timed(i, features) for i in inputs])
    floor = ceilings.floor_us(case.nbytes, case.flops)
    fresh = case.make(device, 99)
    want = case.reference(case.make(device, 99))
    got = case.run(fresh, features)
    error = max(relative_error(g, w) for g, w in zip(got, want, strict=True))
    return {
        "case": case.label,
        "us": microseconds,
        "floor_us": floor,
        "share": floor / microseconds,
        "target": case.target,
        "tbs": case.nbytes / microseconds / 1e6,
        "tflops": case.flops / microseconds / 1e6,
        "error": error,
        "tolerance": case.tolerance,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="labels with this word")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    features = device_features()
    cases = [case for case in all_cases(small=False) if options.only in case.label]
    compile_all([(None, case.label, {}) for case in cases], features)
    ceilings = measure_ceilings()
    print(ceilings)
    rows, failed = [], 0
    for case in cases:
        try:
            row = measure(case, features, ceilings)
        except Exception as error:
            failed += 1
            print(f"{case.label:58s} FAILED {type(error).__name__}: {str(error)[:200]}")
            rows.append({"case": case.label, "failed": f"{type(error).__name__}: {error}"})
            continue
        wrong = row["error"] > row["tolerance"]
        failed += wrong
        print(
            f"{case.label:58s} {row['us']:9.2f} us  {row['share']:5.0%} of floor"
            f" (aim {row['target']:.0%}) {row['tbs']:5.2f} TB/s {row['tflops']:5.0f} TF"
            f"  error {row['error']:.1e}{'  WRONG' if wrong else ''}",
            flush=True,
        )
        rows.append(row)
        torch.cuda.empty_cache()
    if options.json is not None:
        data = {"ceilings": ceilings.as_json(), "cases": rows}
        options.json.write_text(json.dumps(data, indent=1))
    return failed


if __name__ == "__main__":
    sys.exit(main())
