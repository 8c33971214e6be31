# SPDX-License-Identifier: Apache-2.0
"""What a recording that breaks off leaves behind in torch.

Called by the graph runners of backends.
"""

from __future__ import annotations

__all__ = ["recording"]

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager


@contextmanager
def recording(
    capture: AbstractContextManager[object], end: Callable[[], None]
) -> Iterator[None]:
    """Record what is launched inside, and if that breaks off, tell torch's allocator.

    It would believe for ever that the capture goes on, and give no cached memory back as long
    as it does.

    Args:
        capture: The context that records.
        end: Tells the allocator; an error means that it knows already.
    """
    try:
        with capture:
            yield
    except BaseException:
        with suppress(RuntimeError):
            end()
        raise
