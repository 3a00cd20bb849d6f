"""What the machine does during a run: GPUs through NVML, the host through psutil, in a thread of its own."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from nmoe.errors import InputError

Append = Callable[[Mapping[str, Any]], None]


def host(folder: Path) -> dict[str, Any]:
    """Load and memory of the host, and bytes free where `folder` is. CPU use is since the previous call."""
    memory = psutil.virtual_memory()
    return {
        "cpu_percent": psutil.cpu_percent(),
        "memory_used_bytes": memory.used,
        "memory_total_bytes": memory.total,
        "disk_free_bytes": shutil.disk_usage(folder).free,
    }


def versions(nvml: Any) -> dict[str, str]:
    """Driver and CUDA versions, as NVML tells them. NVML is initialised."""
    cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
    return {"driver": nvml.nvmlSystemGetDriverVersion(), "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}"}


def gpus(nvml: Any) -> list[dict[str, Any]]:
    """One reading of every GPU; a figure this GPU does not have is null. NVML is initialised."""
    return [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def get(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(handle, *arguments)
        except nvml.NVMLError_NotSupported:
            return None

    def scaled(value: float | None) -> float | None:
        return None if value is None else value / 1000

    use = get(nvml.nvmlDeviceGetUtilizationRates)
    memory = get(nvml.nvmlDeviceGetMemoryInfo)
    reasons = get(nvml.nvmlDeviceGetCurrentClocksEventReasons)
    corrected, uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    return {
        "index": index,
        "name": nvml.nvmlDeviceGetName(handle),
        "uuid": nvml.nvmlDeviceGetUUID(handle),
        "utilization": None if use is None else use.gpu,
        "memory_used_bytes": None if memory is None else memory.used,
        "memory_total_bytes": None if memory is None else memory.total,
        "power_w": scaled(get(nvml.nvmlDeviceGetPowerUsage)),
        "power_limit_w": scaled(get(nvml.nvmlDeviceGetEnforcedPowerLimit)),
        "temperature_c": get(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "sm_clock_mhz": get(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": get(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        "throttle": None if reasons is None else _throttle(nvml, reasons),
        "ecc_corrected": get(nvml.nvmlDeviceGetTotalEccErrors, corrected, nvml.NVML_VOLATILE_ECC),
        "ecc_uncorrected": get(nvml.nvmlDeviceGetTotalEccErrors, uncorrected, nvml.NVML_VOLATILE_ECC),
    }


def _throttle(nvml: Any, reasons: int) -> list[str]:
    """The names of the reasons that hold a clock down; an idle GPU is not held down."""
    names = {
        "sw_power_cap": nvml.nvmlClocksEventReasonSwPowerCap,
        "hw_slowdown": nvml.nvmlClocksThrottleReasonHwSlowdown,
        "sw_thermal": nvml.nvmlClocksEventReasonSwThermalSlowdown,
        "hw_thermal": nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "hw_power_brake": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    return [name for name, bit in names.items() if reasons & bit]


@contextmanager
def sampling(folder: Path, every_s: float, *, cuda: bool, append: Append, event: Callable[..., None]) -> Iterator[None]:
    """Append a reading every `every_s` seconds until the block ends; the first at once.

    cuda    whether the run computes on a GPU
    append  takes one reading
    event   takes a name and fields: "gpus" with the versions, "telemetry_failed" once a failure begins
    """
    done = threading.Event()
    began = time.monotonic()

    def loop() -> None:
        nvml, last_error = _nvml(event) if cuda else None, ""
        failures = (OSError, InputError, psutil.Error, *(() if nvml is None else (nvml.NVMLError,)))
        while True:
            try:
                readings = [] if nvml is None else gpus(nvml)
                append({"elapsed_s": time.monotonic() - began, "gpus": readings, "host": host(folder)})
                last_error = ""
            except failures as error:
                if str(error) != last_error:
                    last_error = str(error)
                    event("telemetry_failed", error=f"{type(error).__name__}: {error}")
            if done.wait(every_s):
                break
        if nvml is not None:
            nvml.nvmlShutdown()

    thread = threading.Thread(target=loop, name="telemetry", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _nvml(event: Callable[..., None]) -> Any:
    """NVML, initialised; None, after an event that says so, where it cannot be had."""
    try:
        import pynvml
    except ImportError as error:
        event(
            "telemetry_failed",
            error=f"telemetry: expected the extra `telemetry` for figures of the GPU, got {error}; pip "
            f'install "nmoe[telemetry]"',
        )
        return None
    try:
        pynvml.nvmlInit()
        event("gpus", **versions(pynvml))
    except pynvml.NVMLError as error:
        event("telemetry_failed", error=f"NVML: {error}")
        return None
    return pynvml
