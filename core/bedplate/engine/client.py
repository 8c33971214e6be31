# SPDX-License-Identifier: Apache-2.0
"""EngineClient: the ways to ask an engine core, in one thread, as a stream, from asyncio.

``Engine`` is a client that built its own core; a program that brings its own executor makes
the core itself.
"""

from __future__ import annotations

__all__ = ["EngineClient"]

from collections import deque
from typing import TYPE_CHECKING, Any, Self

from bedplate.engine.driver import Driver
from bedplate.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from bedplate.engine.core import EngineCore
    from bedplate.engine.outputs import Delta, RequestOutput, StepResult
    from bedplate.runner.sampling_params import SamplingParams

    Prompt = str | Sequence[int]


class EngineClient:
    """See the module.

    Args:
        core: Plans and runs the passes.
    """

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._driver: Driver | None = None

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
        several = _as_list(prompts)
        done: dict[str, RequestOutput] = {}

        def collect(delta: Delta) -> None:
            if delta.output is not None:
                done[delta.request_id] = delta.output

        names: list[str] = []
        told = -1
        try:
            for prompt, settings in zip(several, _each(params, len(several)), strict=True):
                names.append(self.core.add_request(prompt, settings, sink=collect))
            while len(done) < len(names):
                if progress is not None and told != len(done):
                    told = len(done)
                    progress(told, len(names))
                self.core.step()
        finally:
            for name in names:
                self.core.abort(name)
        if progress is not None:
            progress(len(names), len(names))
        return [done[name] for name in names]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
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

    async def async_generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """``generate`` for asyncio: a thread steps the engine; cancelling aborts."""
        several = _as_list(prompts)
        return await self._drive().generate(several, _each(params, len(several)))

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncGenerator[Delta, None]:
        """``stream`` for asyncio; cancelling, or closing the generator, aborts."""
        return self._drive().stream(prompt, params)

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
        """End all requests; later calls do nothing."""
        if self._driver is not None:
            self._driver.close()
            self._driver = None
        self.core.abort_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _drive(self) -> Driver:
        if self._driver is None:
            self._driver = Driver(self.core)
        return self._driver


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several, as several."""
    if isinstance(prompts, str) or (len(prompts) and not _is_prompt(prompts[0])):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _is_prompt(value: object) -> bool:
    return isinstance(value, str) or hasattr(value, "__len__")


def _each(
    params: SamplingParams | Sequence[SamplingParams] | None, num: int
) -> list[SamplingParams | None]:
    """Settings for each of ``num`` prompts.

    Raises:
        ConfigError: There are several, but not as many.
    """
    if not isinstance(params, list | tuple):
        return [params] * num  # type: ignore[list-item]
    if len(params) != num:
        raise ConfigError(
            f"{len(params)} sampling settings for {num} prompts; give one for all, or one each"
        )
    return list(params)
