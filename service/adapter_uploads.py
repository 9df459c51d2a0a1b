"""Adapters that users bring: PEFT folders, received as two files or as one tar, checked while they arrive.

Only the config and safetensors are kept, under names of ours: nothing of a path or of another file in an archive is
used. What the tensors mean is the engine's to say, in a job of the kind "ingest".
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sqlalchemy.orm import Session

from lora_engine.adapter_header import CONFIG, WEIGHTS
from lora_engine.errors import AdapterError
from lora_engine.fields import to_mapping
from lora_engine.ingest_config import IngestConfig
from lora_engine.ingest_headers import Told, look
from lora_engine.safetensors_file import data_offset
from service import base_models, jobs, leases
from service import storage as objects
from service.db import Database
from service.errors import Invalid, NoSpace, TooLarge, UnsupportedMedia
from service.jobs import Idempotency
from service.models import BaseModel, Job
from service.settings import Settings
from service.storage import Storage
from service.tar_stream import TarStream

INITIAL = "initial"  # the adapter as it was before training, in a folder of its own
_LEASE_SECONDS = 900.0  # for storing what was received
# PEFT's own are a thousand times smaller; what checks them here takes time by their product.
_MAX_CONFIG_BYTES = 128 << 10
_MAX_HEADER_BYTES = 2 << 20
_SIGNATURES = {
    b"PK\x03\x04": "a zip archive, or a pickle of PyTorch's", b"GGUF": "a GGUF file", b"\x1f\x8b": "compressed",
    b"\x93NUMPY": "a NumPy array", b"\x80\x02": "a pickle", b"\x80\x03": "a pickle", b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}  # fmt: skip


class _Pair:
    """The two files of one adapter on their way into `folder`; `label` begins the names of their fields."""

    def __init__(self, folder: Path, limit: int, label: str = "") -> None:
        self._folder, self._limit, self._label = folder, limit, label
        self._config = bytearray()
        self._start = bytearray()
        self._header_bytes: int | None = None
        self._size = 0
        folder.mkdir(exist_ok=True)
        self.file = (folder / WEIGHTS).open("xb")

    @property
    def is_empty(self) -> bool:
        return not self._config and not self._size

    def config(self, data: bytes) -> None:
        """Raises TooLarge."""
        self._config += data
        if len(self._config) > _MAX_CONFIG_BYTES:
            raise self._fault("config", f"is larger than {_MAX_CONFIG_BYTES} bytes", TooLarge)

    def weights(self, data: bytes) -> None:
        """Raises UnsupportedMedia for another format, Invalid for a header that cannot be, TooLarge."""
        self._size += len(data)
        if self._size > self._limit:
            raise self._fault("weights", f"the file is larger than {self._limit} bytes", TooLarge)
        if self._header_bytes is None or len(self._start) < self._header_bytes:
            self._start += data
            self._look_at_start()
        self.file.write(data)

    def finish(self, ingest: IngestConfig | None = None) -> Told:
        """Close the files; what their headers say.

        Raises:
            Invalid: a file is missing; the config is no JSON object; the header and the file do not fit together.
            AdapterError: the tensors and the config do not fit together, or cannot be kept.
        """
        for name, field, size in ((CONFIG, "config", len(self._config)), (WEIGHTS, "weights", self._size)):
            if not size:
                raise self._fault(field, f"{name} is missing; send both files, or a tar with both as `archive`")
        self.file.close()
        (self._folder / CONFIG).write_bytes(self._config)
        try:
            return look(bytes(self._config), bytes(self._start), self._size, ingest)
        except AdapterError as error:
            if "field" not in error.facts:
                raise
            raise self._fault(error.facts["field"], error.message) from None

    def _look_at_start(self) -> None:
        signature = next((what for start, what in _SIGNATURES.items() if self._start.startswith(start)), None)
        if signature is not None:
            raise self._fault("weights", f"the file is {signature}; only safetensors is read", UnsupportedMedia)
        if self._header_bytes is None and len(self._start) >= 8:
            try:
                self._header_bytes = data_offset(bytes(self._start[:8]), self._limit)
            except AdapterError as error:
                raise self._fault("weights", error.message) from None
            if self._header_bytes > _MAX_HEADER_BYTES:
                raise self._fault("weights", f"the header is longer than {_MAX_HEADER_BYTES} bytes", TooLarge)

    def _fault(
        self, field: str, message: str, kind: type[Invalid | TooLarge | UnsupportedMedia] = Invalid
    ) -> Invalid | TooLarge | UnsupportedMedia:
        return kind(f"{self._label}{field}: {message}", param=f"{self._label}{field}")


class Upload:
    """Takes the bytes of one adapter, in pieces of any size, into `folder`. Use it in a `with` block."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.folder = folder
        self._main = _Pair(folder, settings.max_upload_bytes)
        self._initial = _Pair(folder / INITIAL, settings.max_upload_bytes, f"{INITIAL}_")
        self._archive = TarStream({CONFIG: self._main.config, WEIGHTS: self._main.weights})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pair in (self._main, self._initial):
            pair.file.close()

    @property
    def takers(self) -> dict[str, Callable[[bytes], None]]:
        """What takes the bytes of each of the form's files."""
        return {
            "config": self._main.config,
            "weights": self._main.weights,
            "archive": self._archive.write,
            f"{INITIAL}_config": self._initial.config,
            f"{INITIAL}_weights": self._initial.weights,
        }

    def finish(self, ingest: IngestConfig, *, archived: bool) -> tuple[Told, list[dict[str, Any]]]:
        """What the headers say, and name, size and SHA-256 of each file that was received.

        Raises:
            Invalid: a file is missing or torn.
            AdapterError: what the adapter does cannot be kept, or its tensors do not fit its config.
        """
        if archived:
            self._archive.finish()
        told = self._main.finish(ingest)
        pairs = [""]
        if not self._initial.is_empty:
            self._initial.finish()
            pairs.append(f"{INITIAL}/")
        elif told.moved_base:
            raise Invalid(
                f"{INITIAL}_weights: init_lora_weights is {told.moved_base!r}, which changed the base model too; send "
                f"{INITIAL}_config and {INITIAL}_weights, the adapter as it was saved before training",
                param=f"{INITIAL}_weights",
            )
        return told, [_described(self.folder, f"{pair}{name}") for pair in pairs for name in (CONFIG, WEIGHTS)]


def _described(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return {"name": name, "size": path.stat().st_size, "sha256": objects.file_sha256(path)}


@dataclass(frozen=True)
class Foreign:
    """An adapter that was received: its files lie in `folder`."""

    folder: Path
    files: list[dict[str, Any]]
    told: Told
    base_model: str
    name: str | None
    config: IngestConfig

    @property
    def sha256(self) -> str:
        """Of all that the request said."""
        hashes = [f"{file['name']} {file['sha256']}" for file in self.files]
        told = [self.base_model, self.name or "", repr(self.config), *hashes]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()


def source_key(job_id: str, name: str) -> str:
    """Where a received file waits for the worker."""
    return f"jobs/{job_id}/source/{name}"


def submit(
    database: Database, storage: Storage, owner_id: str, foreign: Foreign, idempotency: Idempotency | None = None
) -> tuple[Job, bool]:
    """Store the files and queue the job that makes an adapter of them. Returns the job and whether it is new.

    Raises:
        Invalid: the base model is not in the catalogue, or the name is none.
        Unavailable, NoSpace: the store failed; the job has failed with it.
    """
    with database.unit_of_work() as session:
        job, created = jobs.submit(session, owner_id, lambda: _job(session, foreign), idempotency)
    if created:
        claim = leases.taken(job)
        try:
            for file in foreign.files:
                storage.put_file(source_key(job.id, file["name"]), foreign.folder / file["name"], file["sha256"])
        except BaseException as error:
            code, category = ("disk_full", "capacity") if isinstance(error, NoSpace) else ("not_stored", "platform")
            with database.unit_of_work() as session:
                leases.fail(session, claim, code, category, "the files could not be stored; upload them again")
                jobs.forget_key(session, job.id)
            raise
        with database.unit_of_work() as session:
            leases.hand_over(session, claim)
    return job, created


def _job(session: Session, foreign: Foreign) -> Job:
    base = base_models.catalogued(session, foreign.base_model)
    jobs.check_name(foreign.name)
    _check_base(base, foreign.told)
    job = Job(
        kind="ingest",
        name=foreign.name or "uploaded adapter",
        spec={"ingest": to_mapping(foreign.config), "files": foreign.files},
        base_model_id=base.id,
    )
    leases.take(job, leases.IN_REQUEST, _LEASE_SECONDS)
    return job


def _check_base(base: BaseModel, told: Told) -> None:
    """Layers of names and shapes that the base model has; what else an adapter may change is the engine's to say."""
    shapes = {module["name"]: (module["outputs"], module["inputs"]) for module in base.modules}
    for name, (outputs, inputs) in told.shapes.items():
        shape = shapes.get(name)
        if shape is not None and shape != (outputs, inputs):
            message = f"{name} is {outputs} × {inputs} in the adapter, {shape[0]} × {shape[1]} in {base.id}"
            raise Invalid(f"base_model: {message}: choose the one that it was trained on", param="base_model")
    if told.shapes and not shapes.keys() & told.shapes.keys():
        message = f"{base.id} has no layer {min(told.shapes)}: choose the one that the adapter was trained on"
        raise Invalid(f"base_model: {message}", param="base_model")
