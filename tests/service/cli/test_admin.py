"""What an operator does at the console with users and keys."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service import users
from service.cli.admin import keys_app, users_app
from service.db import Database
from service.errors import Unauthorized


@pytest.fixture
def database(sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setenv("LUTHIER_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("LUTHIER_DATABASE_URL", sqlite_url)
    return Database(sqlite_url)


def run(*words: str) -> str:
    app = {"users": users_app, "keys": keys_app}[words[0]]
    result = CliRunner().invoke(app, list(words[1:]), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_users_and_keys_come_and_go(database: Database) -> None:
    first = run("users", "add", "ann")
    reader = run("keys", "add", "ann", "--scope", "read", "--expires-days", "30")
    assert run("users", "list").endswith("ann")
    with database.reading() as session:
        assert users.authenticate(session, first).scope == "write"
        assert users.authenticate(session, reader).scope == "read"
        user = users.user_by_name(session, "ann")
        assert user is not None
        lifetimes = [key.expires_at and key.expires_at - key.created_at for key in users.keys_of(session, user.id)]
    assert lifetimes == [pytest.approx(30 * 86400, abs=2), None]
    listed = run("keys", "list")
    assert "read  live" in listed
    run("users", "limit", "ann", "--unfinished-jobs", "3")
    with database.reading() as session:
        limited = users.get_user(session, user.id)
        assert (limited.max_unfinished_jobs, limited.max_running_jobs) == (3, None)
    receipt = json.loads(run("users", "delete", "ann"))
    assert receipt["finished_at"] is not None
    assert receipt["receipt"]["api_keys"] == 2
    with database.reading() as session, pytest.raises(Unauthorized):
        users.authenticate(session, first)
    database.close()


def test_an_unknown_user_is_told(database: Database) -> None:
    result = CliRunner().invoke(keys_app, ["add", "nobody"])
    assert result.exit_code == 1
    database.close()
