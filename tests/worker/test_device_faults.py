"""Kernel logs as NVIDIA's driver writes them. There is no GPU here: what it would say stands in files."""

import logging
from pathlib import Path

import pytest

from worker import device_faults
from worker.device_faults import DeviceFault, DeviceFaults, KernelLog, Quarantine, bus_addresses, parse

LOST = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python, GPU has fallen off the bus."


def xid(number: int, bus: str = "PCI:0000:3b:00", text: str = "pid=1, name=python, Something") -> str:
    return f"3,1234,567890,-;NVRM: Xid ({bus}): {number}, {text}"


@pytest.mark.parametrize(
    ("remedy", "numbers"),
    [
        ("restart", (13, 31, 32, 68, 69, 94)),
        ("reset", (46, 48, 62, 64, 95, 109, 119, 120, 140, 143)),
        ("drain", (54, 74, 79)),
        (None, (43, 45, 63, 92, 999)),
    ],
)
def test_numbers_are_sorted_by_what_they_ask_for(remedy: str | None, numbers: tuple[int, ...]) -> None:
    faults = [parse(xid(number)) for number in numbers]
    assert [fault and fault.remedy for fault in faults] == [remedy] * len(numbers)


@pytest.mark.parametrize(
    ("action", "remedy"),
    [("GPU Reset Required", "reset"), ("Node Reboot Required", "drain"), ("Drain P2P", "drain"), ("None", None)],
)
def test_the_drivers_own_verdict_counts(action: str, remedy: str | None) -> None:
    fault = parse(xid(154, text=f"GPU recovery action changed from 0x0 (None) to 0x1 ({action})"))
    assert (fault and fault.remedy) == remedy


def test_what_a_line_says() -> None:
    fault = parse(LOST)
    assert fault == DeviceFault("0000:3b:00", 79, "pid=1234, name=python, GPU has fallen off the bus.", "drain")
    assert str(fault) == "Xid 79 (pid=1234, name=python, GPU has fallen off the bus.)"
    assert str(parse("NVRM: Xid (0000:3B:00.0): 62")) == "Xid 62"
    assert parse("6,1,2,-;usb 1-1: new device") is None


def test_only_what_is_new_is_read_and_only_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "kern.log"
    path.write_text(LOST + "\n")
    log = KernelLog(path)
    assert log.lines() == []
    with path.open("a") as file:
        file.write("one\nNVRM: Xid (PCI:")
        file.flush()
        assert log.lines() == ["one"]
        file.write("0000:3b:00): 48, DBE\n")
        file.flush()
        assert log.lines() == ["NVRM: Xid (PCI:0000:3b:00): 48, DBE"]
    log.close()


def test_the_gravest_of_ones_own_counts_until_the_next_attempt(tmp_path: Path) -> None:
    path = tmp_path / "kern.log"
    path.touch()
    faults = DeviceFaults(KernelLog(path), ["0000:3b:00.0"])

    def say(*lines: str) -> DeviceFault | None:
        with path.open("a") as file:
            file.writelines(line + "\n" for line in lines)
        return faults.worst()

    assert say(xid(79, bus="PCI:0000:af:00")) is None  # another GPU's
    assert (fault := say(xid(31), xid(79), xid(31)))
    assert fault.number == 79
    faults.forget()
    assert faults.worst() is None
    assert (fault := say(xid(13)))
    assert fault.remedy == "restart"
    faults.close()
    assert say(xid(79)) == fault  # nobody listens any more


def test_a_log_that_cannot_be_read_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        faults = DeviceFaults.of_device("cuda:0", tmp_path / "none")
    assert "will not be noticed" in caplog.text
    assert faults.worst() is None
    assert DeviceFaults.of_device("cpu", None).worst() is None


def test_which_gpu_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert bus_addresses("cuda:0", tmp_path / "none") is None
    for bus in ("0000:af:00.0", "0000:3b:00.0"):
        (tmp_path / bus).mkdir()
    assert bus_addresses("cuda:0", tmp_path) == ["0000:3b:00.0"]
    assert bus_addresses("cuda:1", tmp_path) == ["0000:af:00.0"]
    assert bus_addresses("cuda:0", tmp_path, visible="1") == ["0000:af:00.0"]
    assert bus_addresses("cuda:0", tmp_path, visible="GPU-0123abcd") is None
    assert bus_addresses("cuda:2", tmp_path) is None


def test_a_quarantine_lasts_until_the_machine_is_booted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quarantine = Quarantine(tmp_path / "run", "cuda:0")
    assert quarantine.reason is None
    fault = parse(LOST)
    assert fault is not None
    quarantine.impose(fault)
    assert "drain: Xid 79" in str(Quarantine(tmp_path / "run", "cuda:0").reason)
    assert Quarantine(tmp_path / "run", "cuda:1").reason is None
    monkeypatch.setattr(device_faults, "_boot_id", lambda: "another")
    assert quarantine.reason is None
