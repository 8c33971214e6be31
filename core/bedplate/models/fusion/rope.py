# SPDX-License-Identifier: Apache-2.0
"""How a model turns queries and keys: the table of its own angles, and the style.

The angles are whatever the model's rotary module computes, asked once for every position, so
every static scaling of rotary embeddings is served without knowing it.

Shapes: T tokens, R rotated columns, P positions.
"""

from __future__ import annotations

__all__ = ["RopeTables", "RotarySite", "angles_of", "find_rotaries"]

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bedplate.contract import Support
from bedplate.models.fusion.site import Evidence, Shadow, Site
from bedplate.reference.rope import RopeTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bedplate.contract import OpRequest
    from bedplate.models.fusion.attention_block import AttentionSite
    from bedplate.models.fusion.calls import Call
    from bedplate.models.fusion.site import Providers

Angles = tuple[Tensor, Tensor]


def angles_of(call: Call) -> Angles | None:
    """Cosines and sines that a module was given: its one argument that is such a pair."""
    tokens = call.x.shape[-2]
    found = [
        value
        for value in (*call.args, *call.kwargs.values())
        if isinstance(value, tuple | list)
        and len(value) == 2
        and all(
            isinstance(part, Tensor)
            and part.is_floating_point()
            and part.dim() in (2, 3)
            and part.shape[-2] == tokens
            for part in value
        )
    ]
    return (found[0][0], found[0][1]) if len(found) == 1 else None


class RopeTables:
    """Tables of the rotary modules of one model, each made once.

    Args:
        calls: Of the trial.
        positions: ``[T]`` of the trial.
        count: P.
    """

    def __init__(self, calls: Sequence[Call], positions: Tensor, count: int) -> None:
        self._sources = {
            id(call.output[0]): call
            for call in calls
            if isinstance(call.output, tuple)
            and len(call.output) == 2
            and all(isinstance(part, Tensor) for part in call.output)
        }
        self._positions = positions
        self._count = count
        self._made: dict[int, list[RopeTable]] = {}

    def candidates(self, angles: Angles, dtype: torch.dtype) -> list[RopeTable]:
        """Every way in which heads of ``dtype`` may be turned by these angles.

        Empty if no module computes them from positions alone.
        """
        key = id(angles[0])
        if key not in self._made:
            source = self._sources.get(key)
            self._made[key] = [] if source is None else self._tabulate(source, angles, dtype)
        return self._made[key]

    @torch.no_grad()
    def _tabulate(self, source: Call, angles: Angles, dtype: torch.dtype) -> list[RopeTable]:
        every = torch.arange(self._count, device=self._positions.device)
        args = [self._replaced(value, every) for value in source.args]
        kwargs = {name: self._replaced(value, every) for name, value in source.kwargs.items()}
        made = source.module(*args, **kwargs)
        cos, sin = (part.reshape(-1, part.shape[-1]) for part in made)
        rows = self._positions
        if len(cos) != self._count or not (
            torch.equal(cos[rows], angles[0].reshape(len(rows), -1))
            and torch.equal(sin[rows], angles[1].reshape(len(rows), -1))
        ):
            return []
        steps = (True, False) if cos.dtype == dtype else (False,)
        return [
            RopeTable(cos=c.contiguous(), sin=s.contiguous(), style=style, stepwise=stepwise)
            for c, s in _halves(cos, sin)
            for style in ("half", "interleaved")
            for stepwise in steps
        ]

    def _replaced(self, value: Any, every: Tensor) -> Any:
        """Positions of the trial become all positions; everything else stays."""
        if not isinstance(value, Tensor) or value.is_floating_point():
            return value
        if not torch.equal(value.reshape(-1), self._positions):
            return value
        return every.view(*value.shape[:-1], -1)


def _halves(cos: Tensor, sin: Tensor) -> list[Angles]:
    """The distinct columns: one half where both are equal, every second where pairs are."""
    half = cos.shape[-1] // 2
    found = []
    if all(torch.equal(part[:, :half], part[:, half:]) for part in (cos, sin)):
        found.append((cos[:, :half], sin[:, :half]))
    if all(torch.equal(part[:, 0::2], part[:, 1::2]) for part in (cos, sin)):
        found.append((cos[:, 0::2], sin[:, 0::2]))
    return found or [(cos, sin)]


class RotarySite(Site):
    """A rotary module whose angles only fused attention blocks would read: they have tables.

    Args:
        call: The rotary module's call.
        readers: Attention blocks that were given its angles; all of them are found forms.
    """

    pattern = "rotary"

    def __init__(self, call: Call, readers: Sequence[AttentionSite]) -> None:
        self.path = call.path
        self.kind = f"rotary {type(call.module).__name__}"
        self._call, self._readers = call, readers
        self._angles: Angles | None = None

    def requests(self) -> tuple[OpRequest, ...]:
        """None: nothing is computed."""
        return ()

    def pays(self, _providers: Providers) -> Support:
        """Yes, once every reader is fused."""
        if any(reader.form is None for reader in self._readers):
            return Support.no("an attention block reads its angles")
        return Support.yes("fused attention blocks have tables of all angles, nobody reads it")

    def verify(self, _providers: Providers) -> Evidence:
        """Nothing here: the whole model shows whether somebody reads the angles after all."""
        self._angles = self._call.output
        return Evidence(ok=True, text="the trial's positions are not those that it returns")

    def apply(self) -> None:
        """Return angles of the right shape, which nobody reads."""
        if self._angles is not None:
            Shadow(self._forward).put(self._call.module)

    def revert(self) -> None:
        """Uncover the module."""
        Shadow.remove(self._call.module)

    def _forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Angles:
        assert self._angles is not None  # only then is the module shadowed
        cos, sin = (part[..., :1, :].expand(1, x.shape[1], -1) for part in self._angles)
        return cos, sin


def find_rotaries(
    calls: Sequence[Call], attentions: Sequence[AttentionSite]
) -> list[RotarySite]:
    """Rotary modules called once, whose angles reached no module but attention and above."""
    fused = {site.path: site for site in attentions}
    sites = []
    for source in calls:
        if not isinstance(source.output, tuple) or len(source.output) != 2:
            continue
        if sum(call.path == source.path for call in calls) > 1:
            continue
        given = [
            c for c in calls if (a := angles_of(c)) is not None and a[0] is source.output[0]
        ]
        # A layer hands the angles on; whoever has no reader below it is a reader itself.
        last = [c for c in given if not any(o.path.startswith(f"{c.path}.") for o in given)]
        if last and all(c.path in fused for c in last):
            sites.append(RotarySite(source, [fused[c.path] for c in last]))
    return sites
