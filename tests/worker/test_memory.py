"""A real lack of memory, in a control group of its own."""

import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT = 100 << 20
# Like a worker and its host: one watches the counter, the other wants more than there is.
PROGRAM = """
import subprocess, sys
from pathlib import Path
from worker import memory, reasons
from worker.child import HostDied
Path(sys.argv[1], "cgroup.procs").write_text("0")
before = memory.oom_kills()
died = subprocess.run([sys.executable, "-c", "b'x' * (400 << 20)"]).returncode
print(reasons.of(HostDied(died), None, memory.oom_kills() > before).code)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    parent = Path("/sys/fs/cgroup/memory")
    version_1 = parent.is_dir()
    group = (parent if version_1 else parent.parent) / f"luthier-{uuid.uuid4().hex}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(LIMIT))
    except OSError:
        if group.exists():
            group.rmdir()
        pytest.skip("control groups cannot be made here")
    yield group
    group.rmdir()


def test_the_kernel_says_when_memory_ran_out(group: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(group)], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "out_of_memory", done.stderr
