"""A tiny base model on disk, and the examples that train on it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import postgres_database
from tests.tiny_model import make_tiny_model
from tests.worker.bench import Bench


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def examples() -> bytes:
    """JSONL: 48 conversations."""
    rows = [
        [{"role": "user", "content": f"say {number}"}, {"role": "assistant", "content": f"{number} it is " * 2}]
        for number in range(48)
    ]
    return b"".join(json.dumps({"messages": row}).encode() + b"\n" for row in rows)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, examples: bytes) -> Iterator[Bench]:
    """A worker in this process, with its warm host, on SQLite and a local folder."""
    bench = Bench(tmp_path_factory.mktemp("bench"), tiny_model, examples)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def module_postgres_url(postgres_server: str, postgres_template: str) -> Iterator[str]:
    """A database for all tests of a module."""
    with postgres_database(postgres_server, postgres_template) as url:
        yield url
