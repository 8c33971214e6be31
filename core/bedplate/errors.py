# SPDX-License-Identifier: Apache-2.0
"""Every error that Bedplate raises on purpose.

A message says what happened, why, and what to do next, and ends with its stable code in
brackets; the code is a heading in ``docs/reference/errors.md``.  The data behind the message
are attributes of the exception, so that a program need not read the sentence.

    BedplateError
    ├── ConfigError (ValueError)             a setting is wrong or contradicts another
    ├── BackendError                         codes HW…: see registry.faults
    │   ├── BackendNotFoundError             no backend of that name
    │   ├── BackendUnavailableError          known, cannot run here
    │   ├── BackendIncompatibleError         contract versions differ
    │   ├── UnsupportedError (NotImplementedError)   a capability is missing
    │   └── ContractError                    a backend or the core broke the contract
    ├── ModelError
    │   ├── ModelNotFoundError               no such folder or no config in it
    │   ├── UnsupportedModelError            architecture or feature
    │   └── WeightsError                     missing, unexpected, misshapen: all of them
    ├── CapacityError
    │   ├── RequestTooLongError              prompt and new tokens against the limit
    │   └── DeviceMemoryError                asked, free, and the settings that help
    ├── GraphError
    │   ├── CaptureError                     a bucket could not be captured
    │   └── ReplayError                      shape against bucket
    └── InternalError                        our bug
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BackendIncompatibleError",
    "BackendNotFoundError",
    "BackendUnavailableError",
    "BedplateError",
    "BedplateWarning",
    "CapacityError",
    "CaptureError",
    "ConfigError",
    "ContractError",
    "DeviceMemoryError",
    "GraphError",
    "InternalError",
    "ModelError",
    "ModelNotFoundError",
    "ReplayError",
    "RequestTooLongError",
    "UnsupportedError",
    "UnsupportedModelError",
    "WeightsError",
]


class BedplateError(Exception):
    """Root of the tree.

    Args:
        message: What, why, next.
        code: Stable code; the class's own when not given.
        facts: Data of the case, set as attributes of the exception.
    """

    code = "bedplate-error"
    exit_status = 1

    def __init__(self, message: str, *, code: str | None = None, **facts: object) -> None:
        if code is not None:
            self.code = code
        self.message = message
        self.facts = facts
        for name, value in facts.items():
            setattr(self, name, value)
        super().__init__(f"{message} [{self.code}]")


class BedplateWarning(UserWarning):
    """Something deserves attention, and the work goes on."""


class ConfigError(BedplateError, ValueError):
    """A setting is wrong, or contradicts another."""

    code = "config"
    exit_status = 2


class BackendError(BedplateError):
    """A backend package could not be found, loaded, started or obeyed."""

    code = "backend"
    exit_status = 3


class BackendNotFoundError(BackendError):
    """No installed distribution provides a backend of that name."""

    code = "HW001"


class BackendUnavailableError(BackendError):
    """The backend is installed, but cannot run on this machine."""

    code = "HW010"


class BackendIncompatibleError(BackendError):
    """The backend speaks another version of the contract."""

    code = "HW020"


class UnsupportedError(BackendError, NotImplementedError):
    """No provider has the capability that was asked for."""

    code = "HW060"
    exit_status = 4


class ContractError(BackendError):
    """A promise of the contract was broken; the message names who broke it."""

    code = "contract"
    exit_status = 5


class ModelError(BedplateError):
    """A model cannot be found, understood or loaded."""

    code = "model"
    exit_status = 6


class ModelNotFoundError(ModelError, FileNotFoundError):
    """There is no checkpoint at that place."""

    code = "model-not-found"


class UnsupportedModelError(ModelError, NotImplementedError):
    """The architecture, or a feature it uses, has no correct execution here."""

    code = "model-unsupported"


class WeightsError(ModelError):
    """Tensors are missing, unexpected or misshapen; the message lists all of them."""

    code = "weights"


class CapacityError(BedplateError):
    """More was asked than there is room for."""

    code = "capacity"
    exit_status = 7


class RequestTooLongError(CapacityError, ValueError):
    """Prompt and new tokens cannot fit, even alone."""

    code = "request-too-long"


class DeviceMemoryError(CapacityError):
    """The device has too little memory for what was asked."""

    code = "device-memory"


class GraphError(BedplateError):
    """Capturing or replaying a graph failed."""

    code = "graph"


class CaptureError(GraphError):
    """A bucket could not be captured."""

    code = "graph-capture"


class ReplayError(GraphError):
    """A batch does not fit the captured graph."""

    code = "graph-replay"


class InternalError(BedplateError):
    """Our own mistake; please report it."""

    code = "internal"
    exit_status = 70
