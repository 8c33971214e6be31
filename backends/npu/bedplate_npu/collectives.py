# SPDX-License-Identifier: Apache-2.0
"""Collectives by name: torch's process groups run on HCCL, fused operators take its names."""

from __future__ import annotations

__all__ = ["BACKEND", "communicator_name"]

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BACKEND = "hccl"
"""What ``torch.distributed.init_process_group`` is asked for."""


def communicator_name(group: Any, device: torch.device, rank: int) -> str:
    """The name by which an operator with a collective inside finds ``group``.

    Args:
        group: A ``torch.distributed.ProcessGroup`` on HCCL, such as the tensor-parallel one.
        device: This rank's device.
        rank: This process's global rank.
    """
    return str(group._get_backend(device).get_hccl_comm_name(rank))
