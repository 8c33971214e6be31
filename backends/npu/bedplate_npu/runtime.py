# SPDX-License-Identifier: Apache-2.0
"""One NPU as a DeviceRuntime, and what it can do.

torch_npu is imported here and nowhere before: importing it is what fails on a machine that
lacks something, and the failure becomes a sentence with a remedy.
"""

from __future__ import annotations

__all__ = ["NpuOptions", "NpuRuntime", "capabilities"]

import importlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from bedplate.contract import (
    ActivateRequest,
    BackendCapabilities,
    DeviceRuntime,
    Event,
    GraphCapabilities,
    MemoryCapabilities,
)
from bedplate.errors import BackendUnavailableError, ConfigError
from bedplate.reference.runtime import TorchRuntime
from bedplate_npu import availability, collectives, ops

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_GRAPHS_ON_950 = 4
_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class NpuOptions:
    """Settings of ``[backend_options.npu]``.

    Attributes:
        self_test: Compare attention and graphs with the reference before they are offered.
        overlap_update: Renew a graph's lengths from another thread while it is launched.
        check_addresses: Before each replay, that no input of the graph has moved.
        max_graphs: Most graphs that are captured; 0 = what the device allows.
    """

    self_test: bool = True
    overlap_update: bool = False
    check_addresses: bool = False
    max_graphs: int = 0


class NpuRuntime(TorchRuntime):
    """The device ``request.device_index``, current in the thread that made the runtime.

    Attributes:
        options: As given.
        family: ``a2``, ``a3`` or ``950``.
        simulated: Name of the simulated runtime below torch_npu; empty on a device.
        off: Feature → why the self-test switched it off.

    Raises:
        ConfigError: An option is unknown or of the wrong type.
        BackendUnavailableError: torch_npu or a device of that number is missing (HW010), torch
            is of another build (HW011), or the device is of another family (HW012).
    """

    def __init__(self, request: ActivateRequest) -> None:
        self.options = _options(request.options)
        _import_torch_npu(request.environment)
        device = torch.device("npu", request.device_index)
        self.soc = _take(device)
        self.family = availability.soc_family(self.soc)
        self.simulated = request.environment.get(availability.SIMULATED, "")
        self.graph_problem = availability.graph_problem(request.environment)
        self.off: Mapping[str, str] = {}
        super().__init__(device, pinned=True)

    @property
    def max_graphs(self) -> int | None:
        """Most graphs to capture; ``None`` = no limit of ours."""
        cap = _GRAPHS_ON_950 if self.family == "950" else None
        return self.options.max_graphs or cap

    def synchronize(self) -> None:
        """Wait for this device, whichever is current in the calling thread."""
        self._module.synchronize(self.device)

    def record_event(self) -> Event:
        """An event of the current stream."""
        event: Event = self._module.Event()
        event.record()  # type: ignore[attr-defined]
        return event

    @contextmanager
    def inference_guard(self) -> Iterator[None]:
        """No autograd, and our device current: a new thread begins on device 0."""
        self._module.set_device(self.device)
        with torch.no_grad():
            yield

    def seed(self, seed: int) -> None:
        """Seed the host's and the device's generators."""
        torch.manual_seed(seed)
        self._module.manual_seed(seed)

    def shutdown(self) -> None:
        """Give cached memory back; a device that has failed cannot, and need not."""
        with suppress(RuntimeError):
            self._module.synchronize(self.device)
            self._module.empty_cache()


def capabilities(runtime: DeviceRuntime) -> BackendCapabilities:
    """What the device can do, after the self-test switched off what it cannot."""
    assert isinstance(runtime, NpuRuntime)
    if runtime.options.self_test:
        from bedplate_npu.selftest import run_self_test

        runtime.off = run_self_test(runtime)
    reason = runtime.graph_problem or runtime.off.get("graphs", "")
    return BackendCapabilities(
        device_type="npu",
        arch=runtime.family,
        compute_dtypes=_DTYPES,
        kv_dtypes=_DTYPES,
        graph=GraphCapabilities(
            supported=True,
            default=not reason,
            stable_addresses=True,
            update_parameters=True,
            shared_pool=True,
            reason=reason,
        ),
        memory=MemoryCapabilities(
            asynchronous=True,
            pinned_host=True,
            page_sizes=(ops.PAGE_SIZE,),
            index_dtype="int32",
        ),
        determinism="run_to_run",
        facts=_facts(runtime),
    )


def _facts(runtime: NpuRuntime) -> dict[str, str]:
    tested = "off: " + ", ".join(sorted(runtime.off)) if runtime.off else "all features agree"
    return {
        "device": str(torch.get_device_module("npu").get_device_name(runtime.device.index)),
        "driver": availability.driver_version() or "unknown",
        "torch_npu": availability.installed().torch_npu or "unknown",
        "communicator": collectives.BACKEND,
        "runtime": f"simulated ({runtime.simulated})" if runtime.simulated else "the device's",
        "self-test": tested if runtime.options.self_test else "not run",
        "evidence": availability.EVIDENCE,
        **({"simulated": runtime.simulated} if runtime.simulated else {}),
    }


def _options(given: Mapping[str, Any]) -> NpuOptions:
    known = {option.name: type(option.default) for option in fields(NpuOptions)}
    wrong = [
        f"{name} = {value!r}"
        for name, value in given.items()
        if type(value) is not known.get(name)
    ]
    if wrong:
        names = ", ".join(f"{name} ({kind.__name__})" for name, kind in known.items())
        raise ConfigError(
            f"Backend 'npu' cannot take {', '.join(sorted(wrong))}; its options are {names}. "
            "Correct or remove it"
        )
    return NpuOptions(**given)


def _import_torch_npu(environment: Mapping[str, str]) -> None:
    """Import torch_npu, or say what it lacks.

    Raises:
        BackendUnavailableError: Cause and remedy.
    """
    if torch.version.cuda is not None:
        raise BackendUnavailableError(
            f"torch {torch.__version__} in this process is built for CUDA, next to which "
            "torch_npu ends the process. Install the CPU build of torch in an environment of "
            "its own",
            code="HW011",
        )
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError, RuntimeError) as error:
        raise _import_failure(error, environment) from error


def _import_failure(
    error: Exception, environment: Mapping[str, str]
) -> BackendUnavailableError:
    cause = str(error).partition("\n")[0].rstrip(".")
    versions = availability.installed()
    problem = availability.torch_problem(versions)
    if problem:
        code = "HW011" if versions.torch_npu else "HW010"
        return BackendUnavailableError(f"{problem} ({cause})", code=code)
    missing = availability.cann_problem(environment)
    if missing:
        return BackendUnavailableError(f"{missing} ({cause})", code="HW010")
    return BackendUnavailableError(
        f"torch_npu {versions.torch_npu} cannot be imported: {cause}. See whether CANN has the "
        "version that this release of torch_npu asks for, and whether its set_env.sh was run",
        code="HW010",
    )


def _take(device: torch.device) -> int:
    """Make the device current and give its number of a system on chip."""
    module: Any = torch.get_device_module("npu")
    count = module.device_count()
    if not count:
        raise BackendUnavailableError(
            "torch_npu sees no device. See `npu-smi info`, whether the container was given "
            "/dev/davinci*, and ASCEND_RT_VISIBLE_DEVICES",
            code="HW010",
        )
    try:
        module.set_device(device)
    except RuntimeError as error:
        cause = str(error).partition("\n")[0].rstrip(".")
        raise BackendUnavailableError(
            f"{device} cannot be used: {cause}. There are {count} devices; choose one with "
            "--backend npu:INDEX, and see `npu-smi info`",
            code="HW010",
        ) from error
    version = int(module.get_soc_version())
    problem = availability.soc_problem(availability.soc_family(version))
    if problem:
        raise BackendUnavailableError(
            f"{device} is refused: {problem}. Choose another device, or --backend cpu",
            code="HW012",
        )
    return version
