"""What the kernel's log says of a GPU: NVIDIA's Xid events, and what each of them asks for.

    NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python, GPU has fallen off the bus.

The numbers are sorted by the immediate action of NVIDIA's Xid catalogue
(docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html). What a program does wrong (an access beyond its memory)
ends that program; what is wrong with the GPU stays until somebody resets it, and no job is to meet it again.
"""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

log = logging.getLogger(__name__)
Remedy = Literal["restart", "reset", "drain"]

# 43 and 45 only follow another one, 63 and 92 announce wear that the GPU copes with: none of them asks for anything.
_REMEDIES: dict[int, Remedy] = {
    **dict.fromkeys((8, 11, 13, 25, 31, 32, 68, 69, 94), "restart"),
    **dict.fromkeys((46, 48, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158), "reset"),
    **dict.fromkeys((54, 74, 79, 142, 151), "drain"),
}
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<bus>[0-9a-fA-F:.]+)\): (?P<number>\d+)(?:, (?P<text>.*))?")
_RECOVERY_ACTION = 154  # the driver's own verdict, in words
_GPUS = Path("/proc/driver/nvidia/gpus")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class DeviceFault:
    """One Xid event: on which bus address ("0000:3b:00"), its number, its words, and what it asks for."""

    bus: str
    number: int
    text: str
    remedy: Remedy

    def __str__(self) -> str:
        return f"Xid {self.number} ({self.text})" if self.text else f"Xid {self.number}"


def parse(line: str) -> DeviceFault | None:
    """The event of a line of the kernel's log; None for one that tells of none, or of one that asks for nothing."""
    found = _XID.search(line)
    if found is None:
        return None
    number, text = int(found["number"]), (found["text"] or "").strip()
    remedy = _verdict(text) if number == _RECOVERY_ACTION else _REMEDIES.get(number)
    if remedy is None:
        log.info("the GPU driver reports Xid %d: %s", number, text)
        return None
    return DeviceFault(_plain(found["bus"]), number, text, remedy)


def _verdict(text: str) -> Remedy | None:
    words = text.lower()
    if "reboot" in words or "drain" in words:
        return "drain"
    return "reset" if "reset" in words else None


def _plain(bus: str) -> str:
    """Domain, bus and device in lower case, without the function that some write and some do not."""
    return bus.lower().split(".")[0]


class KernelLog:
    """Lines that are new in /dev/kmsg, or in a file that a log daemon appends to. Raises OSError if unreadable."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._descriptor, 0, os.SEEK_END)
        self._rest = ""

    def lines(self) -> list[str]:
        """Those since the last call."""
        text = self._rest
        while piece := self._read():
            text += piece.decode(errors="replace")
        *whole, self._rest = text.split("\n")
        return whole

    def close(self) -> None:
        os.close(self._descriptor)

    def _read(self) -> bytes:
        while True:
            try:
                return os.read(self._descriptor, _READ_BYTES)
            except BlockingIOError:
                return b""
            except BrokenPipeError:  # /dev/kmsg has overwritten what was not read in time
                log.warning("lines of the kernel's log were lost")


class DeviceFaults:
    """The faults of one device since `forget`, the gravest of which counts."""

    def __init__(self, kernel_log: KernelLog | None, buses: Iterable[str] | None = None) -> None:
        """Without a log there are none; without bus addresses those of every GPU count."""
        self._log = kernel_log
        self._buses = None if buses is None else {_plain(bus) for bus in buses}
        self._worst: DeviceFault | None = None

    @classmethod
    def of_device(cls, device: str, kernel_log: Path | None) -> Self:
        """Of "cuda:1" as /dev/kmsg tells of them, or of any device as `kernel_log` does."""
        is_gpu = device.startswith("cuda")
        if not is_gpu and kernel_log is None:
            return cls(None)
        path = kernel_log or Path("/dev/kmsg")
        try:
            return cls(KernelLog(path), bus_addresses(device) if is_gpu else None)
        except OSError as error:
            log.warning("GPU faults will not be noticed: %s cannot be read: %s", path, error.strerror)
            return cls(None)

    def forget(self) -> None:
        """What was before an attempt is not that attempt's."""
        self.worst()
        self._worst = None

    def worst(self) -> DeviceFault | None:
        """The gravest since `forget`."""
        for line in self._log.lines() if self._log is not None else ():
            fault = parse(line)
            if fault is None or not self._is_mine(fault):
                continue
            log.error("the GPU driver reports %s on %s: %s", fault, fault.bus, fault.remedy)
            if self._worst is None or _GRAVITY[fault.remedy] > _GRAVITY[self._worst.remedy]:
                self._worst = fault
        return self._worst

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def _is_mine(self, fault: DeviceFault) -> bool:
        return self._buses is None or fault.bus in self._buses


_GRAVITY: dict[Remedy, int] = {"restart": 0, "reset": 1, "drain": 2}


def bus_addresses(device: str, gpus: Path = _GPUS, visible: str | None = None) -> list[str] | None:
    """The bus address of "cuda:1", counted as CUDA does with CUDA_DEVICE_ORDER=PCI_BUS_ID; None if nobody can tell."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible
    index = int(device.partition(":")[2] or 0)
    try:
        found = sorted(path.name for path in gpus.iterdir())
        if visible:
            index = int(visible.split(",")[index])
        return [found[index]]
    except (OSError, ValueError, IndexError):
        return None


class Quarantine:
    """A device that must not be used until it is reset: a file in the run folder, void once the machine was booted."""

    def __init__(self, folder: Path, device: str) -> None:
        self.path = folder / f"{device.replace(':', '-')}.quarantine"

    def impose(self, fault: DeviceFault) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(f"{_boot_id()}\n{fault.remedy}: {fault} on {fault.bus}\n", encoding="utf-8")
        log.error("the device is out of use: %s. Reset it, or have it looked at, then remove %s", fault, self.path)

    @property
    def reason(self) -> str | None:
        """Why the device is out of use; None when it is not."""
        try:
            boot, _, reason = self.path.read_text(encoding="utf-8").partition("\n")
        except FileNotFoundError:
            return None
        return reason.strip() if boot == _boot_id() else None

    def __str__(self) -> str:
        return str(self.path)


def _boot_id() -> str:
    return _BOOT.read_text(encoding="ascii").strip() if _BOOT.exists() else "unknown"
