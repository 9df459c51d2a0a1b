"""The operator's catalogue of base models: the only ones that jobs can name, each pinned by the hash of its files."""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_engine import base_files
from service.db import newest
from service.errors import Conflict, Invalid, NotFound
from service.models import BaseModel, Job

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DESCRIBE_SECONDS = 300


def describe(folder: Path) -> dict[str, Any]:
    """What the engine says about a model's folder, asked in a process of its own: this one never imports torch.

    Returns:
        architecture, parameters, context_length, and modules: name, inputs, outputs, head of each linear layer.

    Raises:
        Invalid: the engine does not load this model; the message is the engine's.
    """
    command = [sys.executable, "-m", "lora_engine", "describe", str(folder)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_DESCRIBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise Invalid(f"describing {folder} took longer than {_DESCRIBE_SECONDS} s") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"the engine ended with {result.returncode}"]
        raise Invalid(f"{folder} is no base model that can be used: {lines[-1]}", code="base_model_unusable")
    described: dict[str, Any] = json.loads(result.stdout)
    return described


def add(
    session: Session,
    base_model_id: str,
    *,
    folder: Path,
    source: str,
    revision: str | None,
    files: list[dict[str, Any]],
    description: Mapping[str, Any],
) -> BaseModel:
    """Enter a model into the catalogue; entering the same files again changes nothing.

    Args:
        source: where it came from, for people: a repository's name or a path.
        revision: the commit of that repository.
        files: from `lora_engine.base_files.file_list`.
        description: from `describe`.

    Raises:
        Invalid: the id is not one.
        Conflict: the id stands for other files already.
    """
    if not _ID.fullmatch(base_model_id):
        raise Invalid("id: 1 to 100 letters, digits, dots, dashes or underscores", param="id")
    known = session.get(BaseModel, base_model_id)
    if known is not None:
        if known.digest != base_files.digest_of(files):
            raise Conflict(f"{base_model_id} is in the catalogue with other files; choose another id", param="id")
        known.folder = str(folder)
        return known
    row = BaseModel(
        id=base_model_id,
        source=source,
        revision=revision,
        folder=str(folder),
        digest=base_files.digest_of(files),
        files=files,
        architecture=description["architecture"],
        parameters=description["parameters"],
        context_length=description["context_length"],
        modules=list(description["modules"]),
    )
    session.add(row)
    session.flush()
    return row


def get(session: Session, base_model_id: str) -> BaseModel:
    """Raises NotFound."""
    row = session.get(BaseModel, base_model_id)
    if row is None:
        raise NotFound(f"there is no base model {base_model_id[:80]!r}")
    return row


def catalogued(session: Session, base_model_id: str, param: str = "base_model") -> BaseModel:
    """The one that a request names in the field `param`. Raises Invalid."""
    try:
        return get(session, base_model_id)
    except NotFound:
        message = f"{param}: {base_model_id[:80]!r} is not in the catalogue; GET /base-models lists what is"
        raise Invalid(message, param=param) from None


def page(session: Session, after: str | None, limit: int) -> tuple[list[BaseModel], bool]:
    """The catalogue, by id descending, below the id `after`; and whether there is more."""
    rows = select(BaseModel)
    return newest(session, rows, BaseModel.id, after, limit)


def digests(session: Session, base_model_ids: Collection[str]) -> dict[str, str]:
    """The digest of each, by id."""
    rows = select(BaseModel.id, BaseModel.digest).where(BaseModel.id.in_(base_model_ids))
    return {row.id: row.digest for row in session.execute(rows)}


def remove(session: Session, base_model_id: str) -> None:
    """Take a model that nobody has used out of the catalogue; its files stay where they are.

    Raises:
        NotFound: it is not in there.
        Conflict: jobs name it, and their adapters need to know what they belong to.
    """
    row = get(session, base_model_id)
    tuned = Job.spec["tuned_model"].as_string() == base_model_id
    if session.scalar(select(Job.id).where((Job.base_model_id == base_model_id) | tuned).limit(1)) is not None:
        raise Conflict(f"jobs were made with {base_model_id}; it stays in the catalogue", code="in_use")
    session.delete(row)
