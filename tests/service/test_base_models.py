"""The catalogue: what an operator enters, pinned by its files."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lora_engine import base_files
from service import base_models
from service.db import Database
from service.errors import Conflict, Invalid, NotFound
from service.models import BaseModel
from tests.service import rows

PYTHON = sys.executable
DESCRIPTION = {"architecture": "LlamaForCausalLM", "parameters": 10, "context_length": 64, "modules": rows.MODULES}
FILES = [{"name": "model.safetensors", "size": 3, "sha256": "a" * 64}]


def add(database: Database, base_model_id: str, **fields: Any) -> BaseModel:
    values: dict[str, Any] = {
        "folder": Path("/models/x"), "source": "hub/x", "revision": None, "files": FILES, "description": DESCRIPTION,
    }  # fmt: skip
    with database.unit_of_work() as session:
        return base_models.add(session, base_model_id, **values | fields)


def test_an_entry_keeps_what_the_engine_said_and_the_digest(database: Database) -> None:
    add(database, "x-1.5_b")
    with database.reading() as session:
        row = base_models.get(session, "x-1.5_b")
        assert (row.architecture, row.parameters, row.context_length) == ("LlamaForCausalLM", 10, 64)
        assert (row.modules, row.files, row.folder) == (rows.MODULES, FILES, "/models/x")
        assert row.digest == base_files.digest_of(FILES)
        assert base_models.digests(session, ["x-1.5_b", "none"]) == {"x-1.5_b": row.digest}


def test_the_same_files_again_only_move(database: Database) -> None:
    add(database, "x")
    add(database, "x", folder=Path("/elsewhere"))
    with database.reading() as session:
        assert base_models.get(session, "x").folder == "/elsewhere"
    with pytest.raises(Conflict):
        add(database, "x", files=[FILES[0] | {"sha256": "b" * 64}])


@pytest.mark.parametrize("base_model_id", ["", "../x", "a/b", ".x", "x" * 101, "a b", "ü", "a\n"])
def test_an_id_is_one_plain_word(sqlite_database: Database, base_model_id: str) -> None:
    with pytest.raises(Invalid):
        add(sqlite_database, base_model_id)


def test_only_what_nobody_used_is_removed(database: Database) -> None:
    add(database, "used")
    add(database, "unused")
    rows.add_job(database, base_model_id="used")
    with database.unit_of_work() as session:
        base_models.remove(session, "unused")
    with pytest.raises(Conflict), database.unit_of_work() as session:
        base_models.remove(session, "used")
    with database.reading() as session, pytest.raises(NotFound):
        base_models.get(session, "unused")


def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Puts a program where the engine's interpreter would be."""
    path = tmp_path / "engine"
    path.write_text(f"#!{PYTHON}\n{program}")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_folder_is_described_by_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(tmp_path, monkeypatch, f"import sys\nassert sys.argv[1:4] == ['-m', 'lora_engine', 'describe']\n"
                                  f"print({json.dumps(DESCRIPTION)!r})")  # fmt: skip
    assert base_models.describe(tmp_path) == DESCRIPTION


def test_what_the_engine_refuses_is_refused_in_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(tmp_path, monkeypatch, "import sys\nsys.exit('config.json names its own code')")
    with pytest.raises(Invalid, match="names its own code"):
        base_models.describe(tmp_path)
    engine(tmp_path, monkeypatch, "import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(Invalid, match="-9"):
        base_models.describe(tmp_path)
