# SPDX-License-Identifier: Apache-2.0
"""One scenario that every family goes through: ragged, chunked, shared, preempted, decoded."""

from __future__ import annotations

import random

from tests.integration.parity.rig import Rig


def run_story(module, spec, *, vocab_size, decode_steps=4, seed=0, **options):
    """The rig after the whole scenario, and its four sequences."""
    chance = random.Random(seed)
    prompts = [[chance.randrange(3, vocab_size) for _ in range(n)] for n in (13, 5, 21)]
    rig = Rig(module, spec, seed=seed, **options)
    first, second, third = (rig.start(prompt) for prompt in prompts)
    # Ragged, and the first and third prompt only in part.
    rig.extend((first, 9), (second, 5), (third, 6))
    rig.extend((third, 15), (first, 4))
    # A fourth request finds two pages of the first one's prompt in the cache.
    tail = [chance.randrange(3, vocab_size) for _ in range(6)]
    fourth = rig.start(prompts[0][:8] + tail, like=first, shared=8)
    rig.extend((fourth, 6))
    everyone = (third, first, fourth, second)
    for _ in range(decode_steps // 2):
        rig.decode(*everyone)
    # The second loses its cache and comes back in other slots, with one step of the others.
    rig.preempt(second)
    rig.extend((second, len(second.tokens)))
    for _ in range(decode_steps - decode_steps // 2):
        rig.decode(*everyone)
    return rig, everyone
