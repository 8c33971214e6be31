# SPDX-License-Identifier: Apache-2.0
"""A torch device whose kernels are compiled by Triton; backends inherit from it."""

from __future__ import annotations

__all__ = ["TritonRuntime"]

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from bedplate.reference.runtime import TorchRuntime

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from bedplate.contract import Decision


class TritonRuntime(TorchRuntime):
    """One device that works beside the host, with kernels of this package."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, pinned=True)
        from bedplate_triton.tripwire import tripwire

        tripwire.disarm()  # another model of this process may have armed it
        self._make_handles()

    def synchronize(self) -> None:
        """Wait for this device, whichever is current in the calling thread."""
        self._module.synchronize(self.device)

    @contextmanager
    def inference_guard(self) -> Iterator[None]:
        """No autograd, and our device current: which one that is differs between threads."""
        with self._module.device(self.device), torch.no_grad():
            yield

    def rehearsal(self) -> AbstractContextManager[object]:
        """Launches of Triton's kernels compile them, by copies of the process."""
        from bedplate_triton.ahead import compile_ahead

        return compile_ahead()

    def ready(self) -> None:
        """From now on a compile is noted and logged; see ``bedplate_triton.tripwire``."""
        from bedplate_triton.tripwire import tripwire

        tripwire.arm()

    def decisions(self) -> Sequence[Decision]:
        """Launch sizes that did not fit the device, and what was taken instead."""
        from bedplate_triton import configs

        return configs.refusals()

    def shutdown(self) -> None:
        """Give cached memory back; a device that has failed cannot, and need not."""
        with suppress(RuntimeError):
            self._module.synchronize(self.device)
            self._module.empty_cache()

    def _make_handles(self) -> None:
        """Make handle and workspace of matrix products, which no capture may do."""
        square = torch.ones((16, 16), dtype=torch.float16, device=self.device)
        torch.mm(square, square)
