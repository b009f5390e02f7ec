"""Cards that are not there: the functions of `pynvml` that the service calls, with an RTX 3060's
answers unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace


@dataclass(frozen=True)
class FakeCard:
    """One card in its slot; *parts* are the UUIDs of what it is divided into (MIG)."""

    uuid: str = "GPU-00000000-1111-2222-3333-444444444444"
    bus: int = 0x65
    name: str = "NVIDIA GeForce RTX 3060"
    total_bytes: int = 12_884_901_888
    used_bytes: int | None = None
    parts: Sequence[str] = ()


class FakeNvml:
    """Stands in for the module; counts how often the memory was read."""

    NVML_TEMPERATURE_GPU = 0
    nvmlClocksEventReasonSwPowerCap = 0x04
    nvmlClocksEventReasonHwSlowdown = 0x08
    nvmlClocksEventReasonSwThermalSlowdown = 0x20
    nvmlClocksEventReasonHwThermalSlowdown = 0x40
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 0x80

    class NVMLError(Exception):
        """What NVML raises."""

    def __init__(
        self,
        *cards: FakeCard,
        has_power: bool = True,
        used_bytes: int = 9_000_000_000,
        processes: Mapping[int, int | None] | None = None,
        clock_reasons: int | None = 0x04,
    ) -> None:
        """*processes* are bytes by process id; the driver does not tell them where it is None."""
        self.reads = 0
        self._cards = cards or (FakeCard(),)
        self._has_power = has_power
        self._used_bytes = used_bytes
        self._processes = processes
        self._clock_reasons = clock_reasons

    def nvmlInit(self) -> None:
        """Nothing to start."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index >= len(self._cards):
            raise self.NVMLError("invalid argument")
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int | tuple[int, int]:
        for index, card in enumerate(self._cards):
            if uuid == card.uuid:
                return index
            if uuid in card.parts:
                return index, card.parts.index(uuid)
        raise self.NVMLError("not found")

    def nvmlDeviceGetName(self, card: int) -> str:
        return self._cards[card].name

    def nvmlDeviceGetUUID(self, card: int | tuple[int, int]) -> bytes:
        if isinstance(card, tuple):
            return self._cards[card[0]].parts[card[1]].encode()
        return self._cards[card].uuid.encode()

    def nvmlDeviceGetPciInfo(self, card: int) -> SimpleNamespace:
        return SimpleNamespace(busId=f"00000000:{self._cards[card].bus:02X}:00.0".encode())

    def nvmlDeviceGetMigMode(self, card: int) -> list[int]:
        if not self._cards[card].parts:
            raise self.NVMLError("not supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: int) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: int, index: int) -> tuple[int, int]:
        if index >= len(self._cards[card].parts):
            raise self.NVMLError("not found")
        return card, index

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part: tuple[int, int]) -> int:
        return part[0]

    def nvmlDeviceGetMemoryInfo(self, card: int | tuple[int, int]) -> SimpleNamespace:
        self.reads += 1
        one = self._cards[card[0] if isinstance(card, tuple) else card]
        total, used = one.total_bytes, one.used_bytes or self._used_bytes
        if isinstance(card, tuple):
            total, used = total // 7, 0
        return SimpleNamespace(used=used, total=total, free=total - used)

    def nvmlDeviceGetCount(self) -> int:
        return len(self._cards)

    def nvmlDeviceGetCudaComputeCapability(self, card: int) -> tuple[int, int]:
        return (8, 6)

    def nvmlDeviceGetComputeRunningProcesses(self, card: int) -> list[SimpleNamespace]:
        if self._processes is None:
            raise self.NVMLError("not supported")
        return [SimpleNamespace(pid=p, usedGpuMemory=b) for p, b in self._processes.items()]

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

    def nvmlDeviceGetCurrentClocksEventReasons(self, card: int) -> int:
        if self._clock_reasons is None:
            raise self.NVMLError("not supported")
        return self._clock_reasons

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13000
