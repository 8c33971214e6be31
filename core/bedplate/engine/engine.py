# SPDX-License-Identifier: Apache-2.0
"""Engine: a model that answers prompts.

The public face: builds the parts from settings, turns prompts into requests and waits for
them, in one thread, as a stream, or from asyncio.
"""

from __future__ import annotations

__all__ = ["Engine"]

from collections import deque
from typing import TYPE_CHECKING, Any, Self

from bedplate.config import resolve_config
from bedplate.engine.core import EngineCore
from bedplate.errors import ConfigError
from bedplate.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bedplate.config import EngineConfig
    from bedplate.engine.outputs import Delta, RequestOutput, StepResult
    from bedplate.engine.text import Tokenizer
    from bedplate.registry.decisions import DecisionLog
    from bedplate.runner.sampling_params import SamplingParams
    from bedplate.runner.startup import Started

    Prompt = str | Sequence[int]


class Engine:
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

    def _open(
        self, config: EngineConfig, progress: Callable[[str, int, int], None] | None
    ) -> None:
        # Loads the model stack, which ``import bedplate.engine`` should not.
        from bedplate.engine.text import Tokenizer
        from bedplate.runner.startup import start

        self._started = start(config, progress=progress)
        try:
            self.tokenizer = Tokenizer(self._started.tokenizer_folder)
            self.core = _make_core(self._started, self.tokenizer)
        except BaseException:
            self._started.bound.shutdown()
            raise

    @property
    def config(self) -> EngineConfig:
        """The settings, with what the backend proposed."""
        return self._started.config

    @property
    def decisions(self) -> DecisionLog:
        """Every choice that was made at start-up, with its reasons."""
        return self._started.decisions

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts, all together.

        Args:
            prompts: A text or a list of token ids, or several of them.
            params: Settings for all, or one per prompt; greedy by default.
            progress: Told (done, total) whenever some have finished.

        Returns:
            One result per prompt, in order; failed ones say so in ``finish_reason``.

        Raises:
            ConfigError: A prompt or the number of settings is wrong; nothing was begun.
            RequestTooLongError: A prompt cannot fit; nothing was begun.
        """
        several = as_prompts(prompts)
        done: dict[str, RequestOutput] = {}

        def collect(delta: Delta) -> None:
            if delta.output is not None:
                done[delta.request_id] = delta.output

        names: list[str] = []
        try:
            for prompt, settings in zip(several, as_params(params, len(several)), strict=True):
                names.append(self.core.add_request(prompt, settings, sink=collect))
            told = -1
            while len(done) < len(names):
                if progress is not None and told != len(done):
                    told = len(done)
                    progress(told, len(names))
                self.core.step()
        finally:
            for name in names:
                if name not in done:
                    self.core.abort(name)
        if progress is not None:
            progress(len(names), len(names))
        return [done[name] for name in names]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """Answer one prompt piece by piece; leaving the iterator aborts the request.

        Yields:
            Pieces; the last one has the whole result.
        """
        news: deque[Delta] = deque()
        name = self.core.add_request(prompt, params, sink=news.append, stream=True)
        try:
            while True:
                while news:
                    delta = news.popleft()
                    yield delta
                    if delta.output is not None:
                        return
                self.core.step()
        finally:
            self.core.abort(name)

    def add_request(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Any
    ) -> str:
        """Queue a request; ``options`` as of ``EngineCore.add_request``. Then ``step``."""
        return self.core.add_request(prompt, params, **options)

    def abort(self, request_id: str) -> None:
        """End a request as soon as possible."""
        self.core.abort(request_id)

    def step(self) -> StepResult:
        """Move all requests on by one pass."""
        return self.core.step()

    def close(self) -> None:
        """End all requests and give the device back; later calls do nothing."""
        self.core.abort_all()
        self._started.bound.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several."""
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, num: int
) -> list[SamplingParams | None]:
    """Settings for each of ``num`` prompts.

    Raises:
        ConfigError: There are several, but not as many.
    """
    if params is None or not isinstance(params, list | tuple):
        return [params] * num  # type: ignore[list-item]
    if len(params) != num:
        raise ConfigError(
            f"{len(params)} sampling settings for {num} prompts; give one for all, or one each"
        )
    return list(params)


def _make_core(started: Started, tokenizer: Tokenizer) -> EngineCore:
    scheduler = Scheduler(
        allocator=started.allocator,
        req_to_token_pool=started.req_to_token_pool,
        page_size=started.page_size,
        max_context_len=started.max_context_len,
        max_running_requests=started.max_running_requests,
        max_prefill_tokens=max(started.max_prefill_tokens, started.page_size),
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
