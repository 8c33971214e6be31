# SPDX-License-Identifier: Apache-2.0
"""Driver: a thread that steps an engine whenever there is work, for callers in asyncio.

Results reach the caller's event loop by ``call_soon_threadsafe``; a cancelled task aborts its
requests.  Other threads may step the same core meanwhile: they take turns.
"""

from __future__ import annotations

__all__ = ["Driver"]

import asyncio
import logging
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from bedplate.engine.core import EngineCore
    from bedplate.engine.outputs import Delta, RequestOutput
    from bedplate.runner.sampling_params import SamplingParams

_log = logging.getLogger(__name__)


class Driver:
    """See the module.

    Args:
        core: What it steps, from now until ``close``.
    """

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="bedplate-driver", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop after the step under way; what is unfinished stays so."""
        self._stopping = True
        self._core.wake.set()
        self._thread.join()

    async def stream(
        self, prompt: str | Sequence[int], params: SamplingParams | None
    ) -> AsyncGenerator[Delta, None]:
        """News of one request as they come; the last one has the result."""
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[Delta] = asyncio.Queue()

        def tell(delta: Delta) -> None:
            loop.call_soon_threadsafe(news.put_nowait, delta)

        name = self._core.add_request(prompt, params, sink=tell, stream=True)
        try:
            while True:
                delta = await news.get()
                yield delta
                if delta.output is not None:
                    return
        finally:
            self._core.abort(name)

    async def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: Sequence[SamplingParams | None],
    ) -> list[RequestOutput]:
        """Results of several requests, in order."""
        loop = asyncio.get_running_loop()
        results: dict[str, asyncio.Future[RequestOutput]] = {}

        def settle(delta: Delta) -> None:
            future = results[delta.request_id]
            if delta.output is not None and not future.done():
                future.set_result(delta.output)

        def tell(delta: Delta) -> None:
            loop.call_soon_threadsafe(settle, delta)

        try:
            for prompt, settings in zip(prompts, params, strict=True):
                # The sink runs in this thread's loop, so it cannot be earlier than the entry.
                name = self._core.add_request(prompt, settings, sink=tell)
                results[name] = loop.create_future()
            return list(await asyncio.gather(*results.values()))
        finally:
            for name in results:
                self._core.abort(name)

    def _run(self) -> None:
        core = self._core
        while not self._stopping:
            if not core.has_work:
                if core.idle():
                    continue
                core.wake.wait()
                core.wake.clear()
                continue
            try:
                core.step()
            except Exception as error:  # the requests must hear of it, whatever it is
                _log.exception("the engine could not step")
                core.abort_all(f"{type(error).__name__}: {error}")
