# SPDX-License-Identifier: Apache-2.0
"""The conformance kit on the simulated device of layer B.

``python -m backends.npu.tests.kit [OPTIONS]`` takes the options of ``bedplate conformance`` but
``--backend``.  What passes here agrees with documents; no NPU has passed anything.
"""

from __future__ import annotations

__all__ = ["examine"]

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from backends.npu.tests.layers import (
    LABELS,
    ROOT,
    environment,
    on_simulated_device,
    simulated_site,
)


def examine(*options: str, quiet: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the kit in a process of its own.

    Args:
        options: Of ``bedplate conformance``.
        quiet: Keep what it prints in the result.
    """
    with TemporaryDirectory(prefix="bedplate-npu-site-") as folder:
        site = simulated_site(Path(folder))
        return subprocess.run(
            [sys.executable, "-m", "bedplate", "conformance", "--backend", "npu", *options],
            cwd=ROOT, env=environment([site], **on_simulated_device(site)), check=False,
            text=True, stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None,
        )  # fmt: skip


if __name__ == "__main__":
    done = examine(*sys.argv[1:])
    print(f"npu layer B, {LABELS['B']}: the kit ended with status {done.returncode}")
    sys.exit(done.returncode)
