"""A card that is not there: the functions of `pynvml` that the service calls, with an RTX 3060's
answers."""

from __future__ import annotations

from types import SimpleNamespace


class FakeNvml:
    """Stands in for the module; counts how often the memory was read."""

    NVML_TEMPERATURE_GPU = 0

    class NVMLError(Exception):
        """What NVML raises."""

    def __init__(self, *, has_power: bool = True, used_bytes: int = 9_000_000_000) -> None:
        self.reads = 0
        self._has_power = has_power
        self._used_bytes = used_bytes

    def nvmlInit(self) -> None:
        """Nothing to start."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, card: int) -> str:
        return "NVIDIA GeForce RTX 3060"

    def nvmlDeviceGetUUID(self, card: int) -> bytes:
        return b"GPU-00000000-1111-2222-3333-444444444444"

    def nvmlDeviceGetMemoryInfo(self, card: int) -> SimpleNamespace:
        self.reads += 1
        total = 12_884_901_888
        return SimpleNamespace(used=self._used_bytes, total=total, free=total - self._used_bytes)

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetCudaComputeCapability(self, card: int) -> tuple[int, int]:
        return (8, 6)

    def nvmlDeviceGetComputeRunningProcesses(self, card: int) -> list[SimpleNamespace]:
        return []

    def nvmlDeviceGetGraphicsRunningProcesses(self, card: int) -> list[SimpleNamespace]:
        return []

    def nvmlDeviceGetUtilizationRates(self, card: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=87, memory=40)

    def nvmlDeviceGetPowerUsage(self, card: int) -> int:
        if not self._has_power:
            raise self.NVMLError("not supported")
        return 151_500

    def nvmlDeviceGetTemperature(self, card: int, sensor: int) -> int:
        return 66

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13000
