# SPDX-License-Identifier: Apache-2.0
"""How the tokens of one request are chosen, and when it ends."""

from __future__ import annotations

__all__ = ["SamplingParams"]

from dataclasses import dataclass, fields

from bedplate.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Settings of one request. Unset filters are off; temperature 0 is greedy.

    Attributes:
        max_tokens: Most new tokens; ``None`` = until end of text or the context is full.
        min_tokens: End-of-text and stop tokens are impossible before so many new tokens.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep the k most likely tokens; 0 = all.
        top_p: Keep the fewest most likely tokens whose probabilities reach p; 1 = all.
        min_p: Keep tokens at least this fraction as likely as the most likely; 0 = all.
        seed: The same seed gives the same tokens, whatever else is in the batch; ``None`` =
            drawn by the engine.
        stop: Texts that end the request; not part of the output.
        stop_token_ids: Tokens that end the request besides the model's own.
        ignore_eos: Go on after the model's end-of-text token.
        logprobs: Number of most likely tokens to report beside each new one; ``None`` = no
            logprobs at all, 0 = the token's own.
        prompt_logprobs: The same for the prompt's tokens.
        skip_special_tokens: Leave special tokens out of the text.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        # One text, or a list as it comes out of JSON, is as clear as a tuple.
        stop: object = self.stop
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        checks = (
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("min_tokens", self.min_tokens >= 0, "0 or more"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "between 0 and 100"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "between 0 and 1"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2^63 − 1"),
            ("stop", all(self.stop), "non-empty texts"),
            ("logprobs", _count(self.logprobs), "between 0 and 64"),
            ("prompt_logprobs", _count(self.prompt_logprobs), "between 0 and 64"),
        )
        wrong = [
            f"{n} is {getattr(self, n)!r}, must be {rule}" for n, ok, rule in checks if not ok
        ]
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            wrong.append(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        if wrong:
            known = ", ".join(field.name for field in fields(self))
            raise ConfigError(f"Sampling settings: {'; '.join(wrong)}. Settings: {known}")


def _count(value: int | None) -> bool:
    return value is None or 0 <= value <= 64
