"""The two pages for operators name what there is: tests, settings, make targets, metrics."""

import ast
import re
from pathlib import Path

from service.settings import Settings

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()


def named_tests() -> list[tuple[str, str]]:
    """File and name of every test on the page; `::name` alone stands for the file before it."""
    found, file = [], ""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", PAGE):
        file = path or file
        found.append((file, name))
    return found


def functions_in(file: str) -> set[str]:
    path = ROOT / file
    tree = ast.parse(path.read_text()) if path.exists() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    named = named_tests()
    assert len(named) > 60
    assert [f"{file}::{name}" for file, name in named if name not in functions_in(file)] == []


def test_every_promise_fault_and_invariant_has_its_row() -> None:
    rows = re.findall(r"^\| ([PFI]\d+) \|(.*)$", PAGE, re.MULTILINE)
    wanted = [f"{kind}{number}" for kind, last in (("P", 10), ("F", 36), ("I", 10)) for number in range(1, last + 1)]
    assert [name for name, _ in rows] == wanted
    assert [name for name, text in rows if name[0] != "I" and "::test_" not in text] == []


def test_settings_files_and_targets_of_the_pages_exist() -> None:
    text = PAGE + OPERATIONS
    names = {name.lower().removesuffix("_file") for name in re.findall(r"LUTHIER_([A-Z_]+)\b(?!<)", text)} - {""}
    assert names - set(Settings.model_fields) - {"_"} == set()
    targets = set(re.findall(r"`make ([a-z0-9-]+)`", text)) | set(re.findall(r"^make ([a-z0-9-]+)", text, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
    assert [
        path for path in re.findall(r"`((?:tests|lora_engine)/[\w/]+\.py)`", text) if not (ROOT / path).exists()
    ] == []
    metrics = (ROOT / "service" / "metrics.py").read_text()
    assert [name for name in re.findall(r"`(luthier_[a-z_]+)`", OPERATIONS)
            if name.endswith("_seconds") and name not in metrics] == []  # fmt: skip
