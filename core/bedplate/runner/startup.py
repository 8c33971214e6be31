# SPDX-License-Identifier: Apache-2.0
"""From settings to something an engine can drive: backend, model, pools, attention, graphs."""

from __future__ import annotations

__all__ = ["Started", "start", "start_on"]

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bedplate.reference.attention import reference_provider
from bedplate.reference.ops import OPERATIONS
from bedplate.registry.decisions import DecisionLog
from bedplate.registry.door import open_backend
from bedplate.runner.executor import ModelExecutor
from bedplate.runner.loading import model_folder
from bedplate.runner.model_runner import ModelRunner
from bedplate.runner.shadow import open_shadow

if TYPE_CHECKING:
    from bedplate.config import EngineConfig
    from bedplate.contract.memory import TokenToKVPoolAllocator
    from bedplate.memory.req_to_token import ReqToTokenPool
    from bedplate.registry.bind import BoundBackend
    from bedplate.runner.model_runner import Progress
    from bedplate.runner.shadow import Shadow


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """Everything an engine needs.

    Attributes:
        config: The settings.
        bound: The backend; call ``shutdown()`` at the end.
        decisions: Every choice that was made.
        runner: The model and its parts.
        executor: Runs the scheduler's batches.
        tokenizer_folder: Where the tokenizer is.
        eos_token_ids: Tokens that end a text.
        shadow: The second backend that looks on, or ``None``.
    """

    config: EngineConfig
    bound: BoundBackend
    decisions: DecisionLog
    runner: ModelRunner
    executor: ModelExecutor
    tokenizer_folder: Path
    eos_token_ids: tuple[int, ...]
    shadow: Shadow | None

    def shutdown(self) -> None:
        """Give every device back; later calls do nothing."""
        if self.shadow is not None:
            self.shadow.shutdown()
        self.bound.shutdown()

    @property
    def allocator(self) -> TokenToKVPoolAllocator:
        """Slots."""
        return self.runner.allocator

    @property
    def req_to_token_pool(self) -> ReqToTokenPool:
        """Request rows."""
        return self.runner.req_to_token_pool

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.runner.plan.page_size

    @property
    def max_context_len(self) -> int:
        """Most tokens of one request."""
        return self.runner.plan.max_context_len

    @property
    def max_running_requests(self) -> int:
        """Most requests in a pass."""
        return self.runner.plan.max_running_requests

    @property
    def max_prefill_tokens(self) -> int:
        """Most new prompt tokens in a pass."""
        return self.config.chunked_prefill_tokens

    @property
    def overlap(self) -> bool:
        """Whether a step is planned while the one before it runs."""
        return self.runner.plan.overlap


def start(
    config: EngineConfig,
    *,
    progress: Progress | None = None,
    decisions: DecisionLog | None = None,
) -> Started:
    """Open the backend, load the model, make everything ready.

    The backend is shut down again if anything fails.

    Args:
        config: The settings.
        progress: Told about long stages.
        decisions: Where choices are recorded; readable even when the start fails.

    Raises:
        BedplateError: What went wrong, with a remedy.
    """
    decisions = DecisionLog() if decisions is None else decisions
    bound = open_backend(config=config, reference_ops=OPERATIONS, decisions=decisions)
    return start_on(bound, decisions, progress=progress)


def start_on(
    bound: BoundBackend, decisions: DecisionLog, *, progress: Progress | None = None
) -> Started:
    """As ``start``, on a backend that is open already and runs nothing yet.

    Args:
        bound: The backend, with the settings; shut down again if anything fails.
        decisions: Where its choices were recorded, and further ones will be.
        progress: Told about long stages.
    """
    try:
        bound.attention_providers.register(reference_provider)
        runner = ModelRunner(bound.config, bound, decisions, progress)
        runner.initialize()
        eos = _end_tokens(runner)
        shadow = open_shadow(runner)
        return Started(
            config=bound.config,
            bound=bound,
            decisions=decisions,
            runner=runner,
            executor=ModelExecutor(runner, eos, shadow),
            tokenizer_folder=_tokenizer_folder(bound.config),
            eos_token_ids=eos,
            shadow=shadow,
        )
    except BaseException:
        bound.shutdown()
        raise


def _tokenizer_folder(config: EngineConfig) -> Path:
    named = config.tokenizer
    return model_folder(config) if named is None else Path(named).expanduser()


def _end_tokens(runner: ModelRunner) -> tuple[int, ...]:
    """The generation settings' end tokens, else the model's; there may be several."""
    named = getattr(runner.loaded.generation_config, "eos_token_id", None)
    if named is None:
        return runner.spec.eos_token_ids
    return (named,) if isinstance(named, int) else tuple(named)
