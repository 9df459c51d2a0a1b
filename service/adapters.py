"""Adapters: what jobs leave. Files in the object store, and a row that pins each one's size and SHA-256."""

import os
import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy import delete as delete_rows
from sqlalchemy.orm import Session

from lora_engine.adapter_header import CONFIG, LINEAGE, WEIGHTS
from lora_engine.safetensors_file import data_offset
from service import storage as objects
from service.db import newest, now
from service.errors import Conflict, Invalid, NotFound
from service.models import TERMINAL, Adapter, AdapterAlias, AdapterParent, Job
from service.storage import Storage

_ALIAS = re.compile(r"(?!adapter-)[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FIRST_BYTES = 128 << 10  # most headers are shorter, and come with one request to the store
_RESERVED = ("aliases",)  # what stands in an id's place in a path


def get(session: Session, owner_id: str, adapter_id: str, *, keep: bool = False) -> Adapter:
    """One adapter by id or alias; with `keep` nobody deletes it before this transaction ends.

    Raises:
        NotFound: also for another owner's and for a deleted one.
    """
    rows = select(Adapter).where(_is(owner_id, adapter_id))
    adapter = session.scalar(rows.with_for_update(read=True) if keep else rows)
    if adapter is None:
        raise NotFound(f"there is no adapter {adapter_id[:80]!r}")
    return adapter


def page(session: Session, owner_id: str, after: str | None, limit: int) -> tuple[list[Adapter], bool]:
    """The owner's adapters, newest first, below the id `after`; and whether there are more."""
    rows = select(Adapter).where(Adapter.owner_id == owner_id, Adapter.deleted_at.is_(None))
    return newest(session, rows, Adapter.id, after, limit)


def by_recipe(session: Session, owner_id: str, recipe_digest: str) -> Adapter | None:
    """The owner's adapter that was made by this recipe."""
    rows = select(Adapter).join(Job, Job.id == Adapter.job_id)
    made = rows.where(Job.owner_id == owner_id, Job.recipe_digest == recipe_digest, Adapter.deleted_at.is_(None))
    return session.scalar(made.order_by(Adapter.id).limit(1))


def set_alias(session: Session, owner_id: str, alias: str, adapter_id: str) -> AdapterAlias:
    """Let `alias` stand for an adapter, from this commit on; it may have stood for another one.

    Raises:
        Invalid: that is no alias.
        NotFound: no such adapter of this owner.
    """
    if not _ALIAS.fullmatch(alias) or alias in _RESERVED:
        message = "alias: 1 to 100 letters, digits, dots, dashes or underscores, and no adapter's id"
        raise Invalid(message, param="alias")
    adapter = get(session, owner_id, adapter_id, keep=True)
    return session.merge(AdapterAlias(owner_id=owner_id, alias=alias, adapter_id=adapter.id))


def remove_alias(session: Session, owner_id: str, alias: str) -> None:
    """The adapter stays. Raises NotFound."""
    row = session.get(AdapterAlias, (owner_id, alias))
    if row is None:
        raise NotFound(f"there is no alias {alias[:80]!r}")
    session.delete(row)


def aliases(session: Session, owner_id: str) -> list[AdapterAlias]:
    """All of the owner's, by name."""
    rows = select(AdapterAlias).where(AdapterAlias.owner_id == owner_id)
    return list(session.scalars(rows.order_by(AdapterAlias.alias)))


def delete(session: Session, owner_id: str, adapter_id: str) -> str:
    """From the commit on it is gone, its aliases too; the sweep removes its files. Its row stays for the lineage.

    Returns the adapter's id.

    Raises:
        NotFound: no such adapter of this owner.
        Conflict: a job that has not ended uses it.
    """
    rows = select(Adapter.id).where(_is(owner_id, adapter_id))
    found = session.scalar(rows.with_for_update())
    if found is None:
        raise NotFound(f"there is no adapter {adapter_id[:80]!r}")
    adapter_id = found
    uses = select(Job.id).join(AdapterParent, AdapterParent.job_id == Job.id)
    job_id = session.scalar(uses.where(AdapterParent.parent_id == adapter_id, Job.state.not_in(TERMINAL)).limit(1))
    if job_id is not None:
        raise Conflict(f"{job_id} uses the adapter; wait until it has ended, or cancel it", code="in_use")
    session.execute(delete_rows(AdapterAlias).where(AdapterAlias.adapter_id == adapter_id))
    session.execute(update(Adapter).where(Adapter.id == adapter_id).values(deleted_at=now()))
    return adapter_id


def of_jobs(session: Session, job_ids: Collection[str]) -> dict[str, Adapter]:
    """By job, the adapter it has left, a deleted one too."""
    rows = select(Adapter).where(Adapter.job_id.in_(job_ids))
    return {adapter.job_id: adapter for adapter in session.scalars(rows)}


def parents(session: Session, job_ids: Collection[str]) -> dict[str, list[AdapterParent]]:
    """What each of the jobs works on, in the order it was asked for."""
    rows = select(AdapterParent).where(AdapterParent.job_id.in_(job_ids)).order_by(AdapterParent.position)
    found: dict[str, list[AdapterParent]] = defaultdict(list)
    for parent in session.scalars(rows):
        found[parent.job_id].append(parent)
    return found


def fetch(storage: Storage, adapter: Adapter, folder: Path) -> None:
    """Its files, each compared with its SHA-256.

    Raises:
        ObjectMissing, ObjectDamaged: and nothing can be done with the folder.
    """
    for file in adapter.files:
        objects.fetch(storage, f"{adapter.prefix}/{file['name']}", folder / file["name"], file["sha256"])


def fetch_headers(storage: Storage, adapter: Adapter, folder: Path) -> None:
    """What can be known of an adapter before a tensor moves: config, lineage, and the header of its weights.

    The weights file gets its full length, with a hole where the tensors would be, so that its header is checked
    against it.

    Raises:
        ObjectMissing, ObjectDamaged: a file could not be had.
        AdapterError: the weights file has no header.
    """
    for file in adapter.files:
        key, path = f"{adapter.prefix}/{file['name']}", folder / file["name"]
        if file["name"] == WEIGHTS:
            start = b"".join(storage.read(key, 0, min(_FIRST_BYTES, file["size"])))
            length = data_offset(start, file["size"])
            start += b"".join(storage.read(key, len(start), length - len(start))) if length > len(start) else b""
            path.write_bytes(start[:length])
            os.truncate(path, file["size"])
        elif file["name"] in (CONFIG, LINEAGE):
            objects.fetch(storage, key, path, file["sha256"])


def _is(owner_id: str, adapter_id: str) -> ColumnElement[bool]:
    """Ids and aliases cannot be mistaken for each other."""
    named = select(AdapterAlias.adapter_id).where(AdapterAlias.owner_id == owner_id, AdapterAlias.alias == adapter_id)
    either = or_(Adapter.id == adapter_id, Adapter.id == named.scalar_subquery())
    return (Adapter.owner_id == owner_id) & Adapter.deleted_at.is_(None) & either
