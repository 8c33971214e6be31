# SPDX-License-Identifier: Apache-2.0
"""Mistakes before anything runs."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.conformance.mutants.base import mutant

import bedplate.memory.factory
from bedplate.contract import ConformanceProfile, KnownGap
from bedplate.errors import ConfigError
from bedplate_cpu.runtime import CpuRuntime


class Patches(CpuRuntime):
    def __init__(self, request):
        super().__init__(request)
        bedplate.memory.factory.patched = True


class IgnoresOptions(CpuRuntime):
    def __init__(self, request):
        super().__init__(replace(request, options={}))


class WrongOptionError(CpuRuntime):
    def __init__(self, request):
        try:
            super().__init__(request)
        except ConfigError as error:
            raise KeyError("no_such_option") from error


def flapping(capabilities):
    facts = {"draw": str(random.SystemRandom().random())}
    return replace(capabilities, facts=facts)


def with_score(answer):
    return replace(answer, score=random.SystemRandom().randint(1, 99))


def with_twins(answer):
    return replace(answer, devices=answer.devices * 2)


GAP = KnownGap(checks="L2/*", reason="slow", link="", expires="2099-01-01")

MUTANTS = {
    "explains_by_number": mutant(
        0, "explain_error() gives a number", only="L0/explain_error", explain=lambda _error: 7
    ),
    "heavy_import": mutant(0, "plugin.py imports torch", only="L0/import_is_light"),
    "patches_the_core": mutant(
        0, "sets an attribute of the core", only="L0/nothing_is_patched", runtime=Patches
    ),
    "ignores_options": mutant(
        0,
        "takes an unknown option in silence",
        only="L0/unknown_option",
        runtime=IgnoresOptions,
    ),
    "strange_option_error": mutant(
        0, "refuses an option by a KeyError", only="L0/unknown_option", runtime=WrongOptionError
    ),
    "flapping_capabilities": mutant(
        0,
        "declares something else at each activation",
        only="L0/capabilities_repeat",
        capabilities=flapping,
    ),
    "flapping_probe": mutant(0, "gives a random score", only="L0/probe", probe=with_score),
    "twin_devices": mutant(
        0, "gives two devices one number", only="L0/probe", probe=with_twins
    ),
    "no_remedy": mutant(0, "says nothing about what to do", manifest={"remedy": ""}),
    "strange_dtype": mutant(
        0,
        "declares a dtype that torch has not",
        only="L0/capabilities",
        capabilities=lambda c: replace(c, compute_dtypes=(*c.compute_dtypes, "fp32")),
    ),
    "report_of_texts": mutant(
        0, "reports texts instead of items", only="L0/report*", report=("driver fine",)
    ),
    "gap_without_link": mutant(
        0,
        "excuses failures without saying where they are followed",
        only="L0/profile",
        profile=ConformanceProfile(gaps=(GAP,)),
    ),
}
