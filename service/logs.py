"""What processes write about themselves: a line for each event, with the request and the job it is about.

As text, or as JSON with one object a line. Control characters are escaped, so that nothing a client sends can look like
a line of ours; what looks like a secret is replaced. Contents of datasets are written nowhere.
"""

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from service.settings import Settings

_SECRETS = (
    (re.compile(r"(luthier_|whsec_|hf_)[A-Za-z0-9+/_-]{16,}=*"), r"\1…"),
    (re.compile(r"(://[^:/@\s]*):[^@/\s]+@"), r"\1:…@"),
    (re.compile(r"(?i)(bearer |password=|secret_access_key=)[^\s'\"]+"), r"\1…"),
)
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
_CONTROL |= {ord("\n"): "\\n", ord("\r"): "\\r", ord("\t"): "\\t"}
_ACCESS = "service.api.observed"
_QUIET = ("httpx", "httpcore", "alembic", "opentelemetry")

_NOTHING: Mapping[str, str] = MappingProxyType({})
_about: ContextVar[Mapping[str, str]] = ContextVar("about", default=_NOTHING)


@contextmanager
def about(**names: str | None) -> Iterator[None]:
    """Lines that are written in this block, and in threads with a copy of its context, carry these names and values."""
    known = {name: value for name, value in names.items() if value is not None}
    token = _about.set({**_about.get(), **known})
    try:
        yield
    finally:
        _about.reset(token)


def request_id() -> str:
    """That of the request at work here, or nothing."""
    return _about.get().get("request_id", "")


def configure(settings: Settings, process: str) -> None:
    """Let everything that this process logs go to standard error. `process` is its name in every line."""
    as_json = settings.log_format == "json" or (not settings.log_format and settings.environment == "production")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(process) if as_json else TextLines(process))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    # A line for each request is for machines; at a terminal it would hide the others.
    logging.getLogger(_ACCESS).setLevel(logging.INFO if as_json else logging.WARNING)


class TextLines(logging.Formatter):
    """`2026-11-24 17:03:11,042 worker INFO message request_id=…`; a traceback follows on lines of its own."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        names = "".join(f" {name}={value}" for name, value in _facts(record).items())
        message = redacted(record.getMessage() + names).translate(_CONTROL)
        line = f"{self.formatTime(record)} {self._process} {record.levelname} {message}"
        return f"{line}\n{redacted(self.formatException(record.exc_info))}" if record.exc_info else line


class JsonLines(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, process, logger, message, and what it is about."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": redacted(record.getMessage()),
        }
        line |= {name: redacted(value) if isinstance(value, str) else value for name, value in _facts(record).items()}
        if record.exc_info:
            line["exception"] = redacted(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=True, default=str)


def redacted(text: str) -> str:
    """Without what looks like a key, a webhook's secret, a hub's token or a password in a URL."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    """What the line is about, and `extra={"facts": {…}}` of the call."""
    return {**_about.get(), **getattr(record, "facts", {})}
