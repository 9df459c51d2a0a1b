"""Log lines: one a line whatever is in them, with the request and the job they are about, and without secrets."""

import io
import json
import logging
import threading
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path

import pytest

from service import logs
from service.settings import Settings

KEY = "luthier_" + "Ab3-_" * 8
SECRETS = {
    "an API key": f"key {KEY} used",
    "a header": "Authorization: Bearer abc.def-ghi",
    "a password in a URL": "postgresql+psycopg://luthier:hunter2hunter2@db:5432/x",
    "a broker's password": "redis://:hunter2hunter2@redis:6379/0",
    "a webhook's secret": "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oDZ5gGd3mFQjI=",
    "a hub's token": "hf_ABCDEFGHIJKLMNOPQRSTUVWX",
    "a connection string": "connection to host=db password=hunter2hunter2 failed",
}


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.fixture(params=["json", "text"])
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    text = io.StringIO()
    monkeypatch.setattr("sys.stderr", text)
    logs.configure(Settings(data_dir=tmp_path, log_format=request.param), "api")
    return text


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_replaced_also_in_tracebacks_and_facts(written: io.StringIO, name: str) -> None:
    secret = SECRETS[name]
    try:
        raise ValueError(secret)
    except ValueError:
        with logs.about(job_id=secret):
            logging.getLogger("service.x").exception("it failed: %s", secret)
    parts = ("hunter2", KEY, "abc.def-ghi", "C2FVsBQ", "ABCDEFGH")
    assert not any(part in written.getvalue() for part in parts)
    assert "ValueError" in written.getvalue()


def test_names_of_ours_are_no_secrets() -> None:
    text = "luthier_api and luthier_worker at postgresql://luthier@db/x, request-0123456789abcdef"
    assert logs.redacted(text) == text


def test_what_a_client_sends_cannot_look_like_a_line_of_ours(written: io.StringIO) -> None:
    hostile = "x\r\n2026-01-01 api ERROR forged \x1b[31m\u2028\x00"
    logging.getLogger("service.x").info("name %s", hostile)
    lines = written.getvalue().splitlines()
    assert len(lines) == 1
    assert not any(sign in lines[0] for sign in "\x1b\x00\u2028")


def test_json_lines_carry_what_they_are_about_also_in_other_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = io.StringIO()
    monkeypatch.setattr("sys.stderr", text)
    logs.configure(Settings(data_dir=tmp_path, log_format="json"), "worker")
    log = logging.getLogger("service.x")
    with logs.about(job_id="job-1", request_id="request-1"):
        assert logs.request_id() == "request-1"
        thread = threading.Thread(target=copy_context().run, args=(log.warning, "from a thread"))
        thread.start()
        thread.join()
    log.info("afterwards", extra={"facts": {"seconds": 0.5}})
    first, second = map(json.loads, text.getvalue().splitlines())
    assert (first["level"], first["process"], first["job_id"], first["request_id"], first["message"]) == (
        "warning", "worker", "job-1", "request-1", "from a thread",
    )  # fmt: skip
    assert "job_id" not in second
    assert second["seconds"] == 0.5
    assert second["time"].endswith("+00:00")
