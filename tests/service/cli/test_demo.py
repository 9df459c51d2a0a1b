"""`luthier demo`, whole and real: the base model out of its package, a QLoRA job, answers before and after."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_demo_teaches_the_house_format(tmp_path: Path) -> None:
    environment = os.environ | {"COLUMNS": "160", "LUTHIER_DEVICE": "cpu"}
    command = [sys.executable, "-m", "service.cli", "demo", "--folder", str(tmp_path / "demo")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "POST /jobs" in result.stdout
    assert "The base model: 0 of 3 answers" in result.stdout
    assert "With the adapter: 3 of 3 answers" in result.stdout
    assert (tmp_path / "demo" / "adapter").is_dir()
