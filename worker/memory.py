"""How often the kernel has ended a process for lack of memory, where this worker and its host live."""

from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def oom_kills() -> int:
    """Processes ended so far: in this control group where it has one of its own, else on the whole machine."""
    for path in (*_counters(), _PROC / "vmstat"):
        try:
            rows = dict(line.split(" ", 1) for line in path.read_text(encoding="ascii").splitlines())
            return int(rows["oom_kill"])
        except (OSError, KeyError, ValueError):
            continue
    return 0


def _counters() -> list[Path]:
    """The files of both versions of control groups that would say so."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        name = path.lstrip("/")
        if controllers == "":
            found.append(_CGROUPS / name / "memory.events")
        elif "memory" in controllers.split(","):
            found.append(_CGROUPS / "memory" / name / "memory.oom_control")
    return found
