"""What the README tells people to type works."""

import os
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_model import make_tiny_model
from tests.worker.embedded import Embedded

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# As a shell reads them: without comments, one command a line.
LINES = [
    command
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if (command := shlex.split(line, comments=True))
]


@pytest.fixture
def embedded(tmp_path: Path) -> Iterator[Embedded]:
    embedded = Embedded(base_model="smollm2-135m-instruct")
    embedded.set_up(make_tiny_model(tmp_path / "model"))
    yield embedded
    embedded.close()


def test_the_tour_with_curl(embedded: Embedded, tmp_path: Path) -> None:
    (tour,) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert "URL=http://127.0.0.1:8000\n" in tour
    script = tour.replace("http://127.0.0.1:8000", embedded.url)
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"KEY": embedded.key},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert '"Succeeded"' in result.stdout
    assert '"peft_type": "LORA"' in result.stdout
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")
    with tarfile.open(tmp_path / "adapter.tar") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert {"adapter_config.json", "adapter_model.safetensors", "lineage.json"} <= names
    (merge,) = embedded.get("/jobs?kind=merge")["data"]
    assert merge["status"] == "succeeded"
    (alias,) = embedded.get("/adapters/aliases")["data"]
    assert (alias["alias"], alias["adapter"]) == ("orders-live", merge["adapter"])
    with tarfile.open(tmp_path / "export.tar") as archive:
        assert any(name.endswith(".gguf") for name in archive.getnames())


@pytest.mark.parametrize("command", [line for line in LINES if line[0] == "make"], ids=" ".join)
def test_make_targets_exist(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    assert subprocess.run([*command, "--dry-run"], cwd=ROOT, env=environment, capture_output=True).returncode == 0


@pytest.mark.parametrize("command", [line for line in LINES if "luthier" in line], ids=" ".join)
def test_console_commands_exist(command: list[str]) -> None:
    words = command[command.index("luthier") + 1 :]
    verbs = [word for word in words[:2] if re.fullmatch(r"[a-z-]+", word) and not word.startswith("--")]
    verbs = verbs[:2] if verbs[0] in ("users", "keys", "base-models") else verbs[:1]
    environment = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    help_text = subprocess.run(
        [sys.executable, "-m", "service.cli", *verbs, "--help"], env=environment, capture_output=True, text=True
    )
    assert help_text.returncode == 0, help_text.stderr
    for option in (word for word in words if word.startswith("--")):
        assert option in help_text.stdout


@pytest.mark.parametrize("command", [line for line in LINES if "lora_engine" in line], ids=" ".join)
def test_engine_commands_exist(command: list[str]) -> None:
    verb = command[command.index("lora_engine") + 1]
    assert subprocess.run([sys.executable, "-m", "lora_engine", verb, "--help"], capture_output=True).returncode == 0


def test_every_place_of_the_file_map_exists() -> None:
    table = README[README.index("## File map") :]
    places = [
        place for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for place in re.findall(r"`(.*?)`", row)
    ]
    assert len(places) >= 8
    assert [place for place in places if not (ROOT / place).exists()] == []
    words = re.findall(r"`([a-z_]+)`", table)
    modules = {path.stem for folder in ("service", "worker", "lora_engine") for path in (ROOT / folder).glob("*.py")}
    assert [word for word in words if word not in modules] == []
