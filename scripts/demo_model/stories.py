# SPDX-License-Identifier: Apache-2.0
"""Little stories, built sentence by sentence so that the parts fit each other.

Apart from ``tasks`` because a story has no right answer and is not graded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

__all__ = ["story"]

_TRAITS = ("small", "brave", "shy", "curious", "kind", "clever", "sleepy", "cheerful", "lonely")
_HOMES = (
    "in a quiet forest", "by a blue lake", "near an old mill", "on a green hill",
    "in a little village", "under a big oak tree", "at the edge of the sea",
)  # fmt: skip
_DAYS = ("One morning", "One day", "On a rainy afternoon", "One cold winter day", "One evening")
_PLOTS = (
    ("{n} lost a {thing}", "looked behind every stone, but could not find it",
     "the {friend} had seen it shining by the river", "the {thing} was safe again",
     "{n} learned that asking for help is not hard"),
    ("{n} found a {thing} on the path", "did not know who had lost it",
     "the {friend} knew the owner and showed the way", "the owner smiled and thanked them both",
     "{n} learned that honest friends sleep well"),
    ("{n} wanted to cross the wide river", "was afraid of the cold water",
     "the {friend} built a small boat out of leaves", "they reached the other side together",
     "{n} was never afraid of the river again"),
    ("{n} heard a strange noise in the dark", "hid under the blanket and waited",
     "the {friend} brought a lamp, and it was only the wind",
     "they laughed until the sun came up",
     "{n} learned that the dark is full of small things"),
    ("{n} wanted to bake a cake", "had no flour and no sugar",
     "the {friend} brought a full basket from the market",
     "the whole house smelled of warm cake",
     "{n} learned that a shared cake tastes best"),
    ("{n} wanted to see the moon from nearby", "climbed the tallest tree, but it was still far",
     "the {friend} pointed at the pond, where the moon was swimming",
     "they sat by the water all night", "{n} learned to look down as well as up"),
    ("{n} planted a seed in the garden", "waited for days, but nothing grew",
     "the {friend} told {n} to give it water and time", "a red flower stood in the sun",
     "{n} learned that good things need time"),
)  # fmt: skip
_THINGS = ("key", "bell", "ring", "red scarf", "silver coin", "kite", "little book", "drum")
_FRIENDS = ("old owl", "grey mouse", "tall heron", "busy bee", "wise turtle", "young squirrel")
_ENDINGS = ("The end.", "And from that day on, they were friends.", "Then everybody went home.")


def story(rng: Random, hero: str, name: str) -> str:
    """Six sentences about ``name``, who is a ``hero`` (an animal)."""
    start, trouble, help_, outcome, moral = rng.choice(_PLOTS)
    parts = {"n": name, "thing": rng.choice(_THINGS), "friend": rng.choice(_FRIENDS)}
    trait, home = rng.choice(_TRAITS), rng.choice(_HOMES)
    sentences = (
        f"Once upon a time there was a {trait} {hero} named {name} who lived {home}.",
        f"{rng.choice(_DAYS)}, {start}.",
        f"{name} {trouble}.",
        f"Luckily, {help_}.",
        f"Soon {outcome}.",
        f"{moral}.",
        rng.choice(_ENDINGS),
    )
    return " ".join(sentences).format(**parts)
