# SPDX-License-Identifier: Apache-2.0
"""The wire notes what comes after arming, and nothing before."""

from __future__ import annotations

from kernels.tests.offline import compile_launches

CODE = """
import torch
from bedplate_triton.features import Features
from bedplate_triton.tripwire import tripwire

heard = []
triton.knobs.compilation.listener = lambda **facts: heard.append(facts["src"].name)

def launch(size):
    x = torch.empty(4, size, dtype=torch.bfloat16, device="meta")
    rms_norm(x, None, 1e-6, "no_weight", features=Features(arch="sm_90"))

launch(64)
tripwire.arm()
launch(64)
launch(128)
tripwire.disarm()
launch(256)
late = [(each.kernel, "128" in each.facts) for each in tripwire.tripped]
assert late == [("_norm_rows", True)], late
assert heard == ["_norm_rows"] * 3, heard  # whoever listened before still hears
"""


def test_the_wire_trips_after_it_was_armed_and_until_it_is_disarmed():
    assert len(compile_launches("bedplate_triton.norm", CODE)) == 4
