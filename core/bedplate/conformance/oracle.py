# SPDX-License-Identifier: Apache-2.0
"""Oracle: a tiny model in a folder, and what transformers says of any text, on the host.

A token is right if the oracle finds it best, or within what numbers of that dtype leave open:
four times the noise that was measured against the oracle in the same run.
"""

from __future__ import annotations

__all__ = ["NEW", "Oracle", "Parity", "greedy"]

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bedplate.conformance.check import require
from bedplate.engine.engine import Engine
from bedplate.runner.sampling_params import SamplingParams
from bedplate.testing.tiny_models import family, tiny_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from bedplate.conformance.subject import Subject
    from bedplate.engine.outputs import RequestOutput

NEW = 10
LENGTHS = (5, 33, 1, 17, 48, 16)
_NOISES = 4.0
"""A choice is decided where the oracle's margin is more than so many times the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Outputs held against the oracle.

    Attributes:
        noise: Largest difference of a log-probability.
        agreement: Share of tokens that are the oracle's best.
        margin: Largest margin by which the oracle preferred another token.
    """

    noise: float
    agreement: float
    margin: float

    def check(self, limit: float) -> dict[str, float]:
        """Numbers for the report.

        Raises:
            Wrong: Numbers are further off than ``limit``, or a decided token is another.
        """
        require(
            self.noise <= limit,
            f"log-probabilities are {self.noise:.1e} off transformers', allowed {limit:.0e}",
        )
        noise = max(self.noise, 1e-5)
        require(
            self.margin <= _NOISES * noise,
            f"a token differs from transformers' where it is decided by {self.margin:.1e}, "
            f"{self.margin / noise:.0f} times the noise",
        )
        return {
            "noise": float(f"{self.noise:.2e}"),
            "agreement": round(self.agreement, 4),
            "margin": float(f"{self.margin:.2e}"),
        }


class Oracle:
    """One family in one dtype.

    Args:
        name: A certified family; see ``testing.tiny_models``.
        dtype: Name of the dtype of the checkpoint.
    """

    def __init__(self, name: str, dtype: str = "float32") -> None:
        self.dtype = dtype
        model_class, config = family(name)
        self.vocab_size: int = config.get_text_config().vocab_size
        self._folder = tempfile.TemporaryDirectory(prefix=f"bedplate-{name}-")
        model = tiny_model(model_class, config, dtype=getattr(torch, dtype))
        model.save_pretrained(self._folder.name)
        self.model = model.float()

    def close(self) -> None:
        """Delete the checkpoint."""
        self._folder.cleanup()

    @property
    def folder(self) -> Path:
        """The checkpoint."""
        return Path(self._folder.name)

    def prompts(self, lengths: Sequence[int] = LENGTHS, seed: int = 5) -> list[list[int]]:
        """Random prompts of these lengths."""
        rng = np.random.default_rng(seed)
        return [rng.integers(4, self.vocab_size, size=n).tolist() for n in lengths]

    @contextmanager
    def engine(self, subject: Subject, **settings: Any) -> Iterator[Engine]:
        """An engine of the model on the subject, small enough for any machine."""
        usual = {
            "model": str(self.folder), "dtype": self.dtype, "max_running_requests": 8,
            "max_context_len": 96, "max_total_tokens": 1024, "graphs": False,
        }  # fmt: skip
        with (
            subject.open(**(usual | settings)) as opened,
            Engine.from_backend(opened.bound, opened.decisions) as engine,
        ):
            yield engine

    @torch.no_grad()
    def logprobs(self, tokens: Sequence[int]) -> Tensor:
        """``[T, V]`` float32: of each next token, given those before."""
        logits = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return torch.log_softmax(logits.float(), -1)

    def parity(self, prompts: Sequence[list[int]], outputs: Sequence[RequestOutput]) -> Parity:
        """Hold greedy outputs against the oracle, which is given the chosen tokens."""
        gaps, margins, best = [], [], 0
        for prompt, output in zip(prompts, outputs, strict=True):
            require(not output.error, f"a request fails: {output.error}")
            ids = torch.tensor(output.token_ids)
            rows = self.logprobs([*prompt, *output.token_ids])[len(prompt) - 1 : -1]
            own = rows.gather(1, ids[:, None])[:, 0]
            margins.append(float((rows.max(-1).values - own).max()))
            best += int((rows.argmax(-1) == ids).sum())
            if output.logprobs:
                ours = torch.tensor([entry.logprob for entry in output.logprobs])
                gaps.append(float((ours - own).abs().max()))
            if output.prompt_logprobs:
                gaps.append(self._prompt_gap(prompt, output))
        total = sum(len(output.token_ids) for output in outputs)
        return Parity(noise=max(gaps, default=0.0), agreement=best / total, margin=max(margins))

    def _prompt_gap(self, prompt: list[int], output: RequestOutput) -> float:
        if len(prompt) < 2 or not output.prompt_logprobs:
            return 0.0
        rows = self.logprobs(prompt)[:-1]
        want = rows.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        ours = torch.tensor([entry.logprob for entry in output.prompt_logprobs])
        require(len(ours) == len(want), f"{len(ours)} prompt log-probabilities of {len(want)}")
        return float((ours - want).abs().max())


def greedy(**changes: Any) -> SamplingParams:
    """Greedy settings with log-probabilities of everything."""
    usual = {"max_tokens": NEW, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}
    return SamplingParams(**(usual | changes))
