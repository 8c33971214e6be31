# SPDX-License-Identifier: Apache-2.0
"""What a model is, as observed by the probe.

The pools, the attention backend and the engine's limits are built from this record; nothing
downstream reads a configuration file for any of it.
"""

from __future__ import annotations

__all__ = ["ModelSpec"]

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bedplate.contract.attention import AttentionCallSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One causal language model.

    Attributes:
        architecture: Name of the transformers class.
        model_type: The configuration's word for the family.
        calls: Every attention call of one forward, in the order in which they come.
        hidden_size: Width of the states that the head sees.
        vocab_size: Columns of the logits.
        num_layers: Decoder layers by the configuration; ``calls`` may be more or fewer.
        max_position_embeddings: Longest request that is served correctly, in tokens;
            ``None`` where nothing limits it.
        eos_token_ids: Ids that end a text, by the model's configuration.
        tied_embeddings: Input and output embeddings share their storage.
        dtype: Name of the dtype the checkpoint declares; empty where it does not.
        position_offset: What the model adds to positions when it counts them itself.
        position_modules: Modules whose keyword ``position_ids`` is the model's own count and
            has to be replaced; empty where the forward takes positions.
        past_length_seam: Some part counts tokens on top of the cache's past length, although
            the forward takes positions; a stand-in for the cache corrects it.
        takes_logits_to_keep: The forward can compute the logits of chosen rows alone.
        siblings: Paths of linear layers that read the same tensor, a tuple for each group, in
            order of their calls.
        evidence: Sentences that say how facts were learned where it was not plain sight.
        limits: Sentences that say what is refused, and why.
    """

    architecture: str
    model_type: str
    calls: tuple[AttentionCallSpec, ...]
    hidden_size: int
    vocab_size: int
    num_layers: int
    max_position_embeddings: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    tied_embeddings: bool = False
    dtype: str = ""
    position_offset: int = 0
    position_modules: tuple[str, ...] = ()
    past_length_seam: bool = False
    takes_logits_to_keep: bool = True
    siblings: tuple[tuple[str, ...], ...] = ()
    evidence: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
