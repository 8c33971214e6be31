# SPDX-License-Identifier: Apache-2.0
"""The door: how backends and plugins come in, one module per stage.

``enumerate`` (metadata only) → ``inspect`` (light import, contract checks) → ``probe`` (could
it run here) → ``select`` (pure choice) → ``bind`` (activate, freeze, seal).  ``door`` runs
them in order; ``faults`` holds every message; ``decisions`` keeps every choice.
"""

from __future__ import annotations

from bedplate.registry.bind import BoundBackend
from bedplate.registry.decisions import CHOICE_POINTS, DecisionLog
from bedplate.registry.door import explain_backend, open_backend, survey
from bedplate.registry.faults import FAULTS, fault

__all__ = [
    "CHOICE_POINTS",
    "FAULTS",
    "BoundBackend",
    "DecisionLog",
    "explain_backend",
    "fault",
    "open_backend",
    "survey",
]
