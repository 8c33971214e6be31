# SPDX-License-Identifier: Apache-2.0
"""Engine: a model that answers prompts.

Builds the parts of an ``EngineCore`` from settings; what can be asked of it is in
``EngineClient``.
"""

from __future__ import annotations

__all__ = ["Engine"]

import gc
from typing import TYPE_CHECKING, Any, Self

from bedplate.config import resolve_config
from bedplate.engine.client import EngineClient
from bedplate.engine.core import EngineCore
from bedplate.graph.capture_state import pause_gc
from bedplate.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from bedplate.config import EngineConfig
    from bedplate.engine.text import Tokenizer
    from bedplate.registry.bind import BoundBackend
    from bedplate.registry.decisions import DecisionLog
    from bedplate.runner.model_runner import ModelRunner
    from bedplate.runner.shadow import ShadowReport
    from bedplate.runner.startup import Started


class Engine(EngineClient):
    """One model on one backend.

    Args:
        model: Folder of a checkpoint; ``None`` takes the bundled demo model.
        backend: Name of a backend, an order of preference, or ``auto``.
        **settings: Further fields of ``EngineConfig``.

    Raises:
        BedplateError: It could not start; the message says what to do.
    """

    def __init__(
        self, model: str | None = None, *, backend: str | None = None, **settings: Any
    ) -> None:
        self._open(resolve_config({"model": model, "backend": backend, **settings}), None)

    @classmethod
    def from_config(
        cls, config: EngineConfig, *, progress: Callable[[str, int, int], None] | None = None
    ) -> Self:
        """Start from resolved settings.

        Args:
            config: The settings.
            progress: Told (what, done, total) during long stages.
        """
        engine = cls.__new__(cls)
        engine._open(config, progress)
        return engine

    @classmethod
    def from_backend(cls, bound: BoundBackend, decisions: DecisionLog) -> Self:
        """Start on a backend that is open already, with its settings; it is the engine's then.

        Args:
            bound: From ``registry.open_backend``; shut down by ``close``.
            decisions: The log that it was opened with.
        """
        from bedplate.runner.startup import start_on

        engine = cls.__new__(cls)
        engine._adopt(start_on(bound, decisions))
        return engine

    def _open(
        self, config: EngineConfig, progress: Callable[[str, int, int], None] | None
    ) -> None:
        gc.collect()  # before there is much to walk
        with pause_gc():  # a fifth of the time it takes to import so much
            # Loads the model stack, which ``import bedplate.engine`` should not.
            from bedplate.runner.startup import start
        gc.freeze()  # modules live long, too
        try:
            self._adopt(start(config, progress=progress))
        except BaseException:
            gc.unfreeze()
            raise

    def _adopt(self, started: Started) -> None:
        self._started = started
        try:
            self.tokenizer = _find_tokenizer(self._started)
            super().__init__(_make_core(self._started, self.tokenizer))
        except BaseException:
            self._started.shutdown()
            raise
        # What start-up made lives long: the collector would walk it for a tenth of a second,
        # in the middle of some step.
        gc.collect()
        gc.freeze()

    @property
    def config(self) -> EngineConfig:
        """The settings, with what the backend proposed."""
        return self._started.config

    @property
    def decisions(self) -> DecisionLog:
        """Every choice that was made at start-up, with its reasons."""
        return self._started.decisions

    @property
    def shadow(self) -> ShadowReport | None:
        """What the second backend has seen so far; ``None`` where none looks on."""
        shadow = self._started.shadow
        return None if shadow is None else shadow.report

    @property
    def runner(self) -> ModelRunner:
        """The model and its parts, for weight updates and passes of your own."""
        return self._started.runner

    def close(self) -> None:
        """End all requests and give the device back; later calls do nothing."""
        super().close()
        self._started.shutdown()
        gc.unfreeze()


def _find_tokenizer(started: Started) -> Tokenizer | None:
    """The folder's tokenizer; ``None`` where it has none and nobody asked for one.

    Such an engine takes and gives token ids.
    """
    from bedplate.engine.text import Tokenizer, has_tokenizer

    if started.config.tokenizer is None and not has_tokenizer(started.tokenizer_folder):
        return None
    return Tokenizer(started.tokenizer_folder)


def _make_core(started: Started, tokenizer: Tokenizer | None) -> EngineCore:
    scheduler = Scheduler(
        allocator=started.allocator,
        req_to_token_pool=started.req_to_token_pool,
        page_size=started.page_size,
        max_context_len=started.max_context_len,
        max_running_requests=started.max_running_requests,
        max_prefill_tokens=max(started.max_prefill_tokens, started.page_size),
        mixed=started.config.mixed,
        prefix_cache=started.config.prefix_cache,
        overlap=started.overlap,
    )
    return EngineCore(
        scheduler=scheduler,
        executor=started.executor,
        eos_token_ids=started.eos_token_ids,
        tokenizer=tokenizer,
        vocab_size=started.runner.spec.vocab_size,
        seed=started.config.seed,
        observers=started.bound.step_observers,
        explain_error=started.bound.explain_error,
    )
