"""Every setting, typed, with a default that runs embedded on one machine. Environment prefix: LUTHIER_."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

# What tutorials use. A service that is trusted with other people's data does not start with one of these.
_PLACEHOLDERS = {"", "admin", "changeme", "change-me", "default", "luthier", "password", "postgres", "redis", "secret"}


# The kernel's limit for a unix socket's path is 108 bytes, less a margin for the broker's own suffixes.
_MAX_SOCKET_PATH = 90


def _socket_path(data_dir: Path) -> Path:
    path = data_dir / "run" / "valkey.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        return path
    short = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"luthier-{os.getuid()}-{short}" / "valkey.sock"


class Settings(BaseSettings):
    """Read once per process. Empty URLs mean the embedded parts below `data_dir`."""

    model_config = SettingsConfigDict(env_prefix="LUTHIER_", frozen=True)

    environment: Literal["embedded", "production"] = "embedded"
    data_dir: Path = Field(default=Path("~/.luthier"), description="models, work files, and all data when embedded")
    database_url: str = Field(default="", description="postgresql+psycopg://… ; empty: SQLite in data_dir")
    broker_url: str = Field(default="", description="redis://… ; empty: Valkey on a unix socket in data_dir")
    storage_url: str = Field(default="", description="file:///folder or s3://bucket/prefix; empty: data_dir/objects")

    device: str = Field(default="auto", description='the worker\'s device: "auto", "cpu", "cuda:0" …')
    threads: int = Field(default=0, ge=0, description="CPU threads of the training process; 0: one per core")
    host_idle_seconds: float = Field(default=600, gt=0, description="how long a base model stays warm without a job")

    lease_seconds: float = Field(default=60, gt=0, description="a job is given to another worker after this silence")
    heartbeat_seconds: float = Field(default=10, gt=0, description="how often a worker renews its lease")
    poll_seconds: float = Field(default=10, gt=0, description="how often a worker looks for jobs without being told")
    sweep_seconds: float = Field(default=10, gt=0, description="how often expired leases and unsent messages are swept")
    rewake_seconds: float = Field(default=30, gt=0, description="age at which a queued job is announced again")
    cancel_grace_seconds: float = Field(default=30, gt=0, description="from a cancel to SIGKILL of its process")
    drain_grace_seconds: float = Field(default=120, gt=0, description="time a stopping worker has for its checkpoint")

    alive_file: Path | None = Field(default=None, description="touched while the sweep goes round, for health checks")

    max_upload_bytes: int = Field(default=512 << 20, gt=0)
    max_dataset_rows: int = Field(default=10_000_000, gt=0)
    max_body_bytes: int = Field(default=1 << 20, gt=0, description="of a JSON request")
    max_merge_in_request_bytes: int = Field(
        default=32 << 20, ge=0, description="stacks of adapters that are no larger in all are made within the request"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        data = self.data_dir.expanduser().resolve()
        embedded = {
            "data_dir": data,
            "database_url": self.database_url or f"sqlite:///{data / 'luthier.db'}",
            "broker_url": self.broker_url or f"redis+socket://{_socket_path(data)}?virtual_host=0",
            "storage_url": self.storage_url or f"file://{data / 'objects'}",
        }
        if self.environment == "production":
            for name in ("database_url", "broker_url"):
                self._refuse_placeholder(name)
        for name, value in embedded.items():
            object.__setattr__(self, name, value)
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError("lease_seconds must be at least twice heartbeat_seconds, or healthy workers lose jobs")
        return self

    def _refuse_placeholder(self, name: str) -> None:
        url = getattr(self, name)
        if not url:
            raise ValueError(f"LUTHIER_{name.upper()} must be set in production")
        if (urlsplit(url).password or "") in _PLACEHOLDERS:
            raise ValueError(f"LUTHIER_{name.upper()} has no password, or a placeholder for one; set your own secret")

    @property
    def embedded_broker_socket(self) -> Path | None:
        """Where `luthier up` has to start a broker; None when `broker_url` names somebody else's."""
        path = _socket_path(self.data_dir)
        return path if self.broker_url == f"redis+socket://{path}?virtual_host=0" else None

    @property
    def models_dir(self) -> Path:
        return self.data_dir / "models"

    @property
    def run_dir(self) -> Path:
        """Sockets and locks of the processes on this machine."""
        return self.data_dir / "run"

    @property
    def work_dir(self) -> Path:
        """Uploads in flight and the workers' scratch folders; safe to empty while nothing runs."""
        return self.data_dir / "work"
