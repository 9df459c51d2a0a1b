import hashlib
from pathlib import Path

from lora_engine import base_files


def make(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def test_files_that_matter_are_listed_in_order_with_size_and_hash(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", model__safetensors="weights", config__json="{}", README__md="words", x__bin="pickle")
    assert base_files.file_list(folder) == [
        {"name": "config.json", "size": 2, "sha256": hashlib.sha256(b"{}").hexdigest()},
        {"name": "model.safetensors", "size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()},
    ]


def test_the_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    first = make(tmp_path / "a", config__json="{}", model__safetensors="w", README__md="one")
    same = make(tmp_path / "b", model__safetensors="w", config__json="{}", README__md="two")
    other = make(tmp_path / "c", model__safetensors="v", config__json="{}")
    renamed = make(tmp_path / "d", model2__safetensors="w", config__json="{}")
    assert base_files.digest(first) == base_files.digest(same)
    assert len({base_files.digest(folder) for folder in (first, other, renamed)}) == 3
    assert base_files.digest(first) == base_files.digest_of(base_files.file_list(first)[::-1])
