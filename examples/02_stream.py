# SPDX-License-Identifier: Apache-2.0
"""Print a text while it is being written, and count the pieces."""

from bedplate import Engine, SamplingParams

with Engine() as engine:
    pieces = 0
    params = SamplingParams(max_tokens=48, temperature=0.7, seed=7)
    for delta in engine.stream("Once upon a time", params):
        print(delta.text, end="", flush=True)
        pieces += bool(delta.text)
    print(f"\n({pieces} pieces)")
