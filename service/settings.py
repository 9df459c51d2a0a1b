"""Every setting, typed, with a default that runs embedded on one machine. Environment prefix: LUTHIER_.

Any of them can lie in a file that LUTHIER_<NAME>_FILE names, as secrets do that are mounted into a container.
"""

import hashlib
import os
import tempfile
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

# What tutorials use. A service that is trusted with other people's data does not start with one of these.
_PLACEHOLDERS = {"", "admin", "changeme", "change-me", "default", "luthier", "password", "postgres", "redis", "secret"}
_SHORTEST_SECRET = 16

# The kernel's limit for a unix socket's path is 108 bytes, less a margin for the broker's own suffixes.
_MAX_SOCKET_PATH = 90


def _socket_path(data_dir: Path) -> Path:
    path = data_dir / "run" / "valkey.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        return path
    short = hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"luthier-{os.getuid()}-{short}" / "valkey.sock"


def _with_password(url: str, password: str) -> str:
    """`url` with `password` in it, unless it has one."""
    parts = urlsplit(url)
    if not password or not parts.netloc or parts.password is not None:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}").geturl()


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Files(PydanticBaseSettingsSource):
    """Values from the files that LUTHIER_<NAME>_FILE names, without the line end that editors leave."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:  # noqa: ARG002
        variable = f"LUTHIER_{field_name.upper()}"
        path = os.environ.get(f"{variable}_FILE")
        if not path:
            return None, field_name, False
        if os.environ.get(variable):
            raise ValueError(f"{variable} and {variable}_FILE are both set; keep one")
        try:
            return Path(path).read_text(encoding="utf-8").strip(), field_name, False
        except OSError as error:
            raise ValueError(f"{variable}_FILE: {path}: {error.strerror}") from None

    def __call__(self) -> dict[str, Any]:
        found = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in found.items() if value is not None}


class Settings(BaseSettings):
    """Read once per process. Empty URLs mean the embedded parts below `data_dir`."""

    model_config = SettingsConfigDict(env_prefix="LUTHIER_", frozen=True, hide_input_in_errors=True)

    environment: Literal["embedded", "production"] = "embedded"
    data_dir: Path = Field(default=Path("~/.luthier"), description="models, work files, and all data when embedded")
    database_url: str = Field(default="", repr=False, description="postgresql+psycopg://… ; empty: SQLite in data_dir")
    database_password: str = Field(default="", repr=False, description="for a database_url without one")
    api_database_password: str = Field(
        default="", repr=False, description="for `luthier migrate`: of the role luthier_api, which it makes"
    )
    worker_database_password: str = Field(
        default="", repr=False, description="for `luthier migrate`: of the role luthier_worker, which it makes"
    )
    broker_url: str = Field(
        default="", repr=False, description="redis://… ; empty: Valkey on a unix socket in data_dir"
    )
    broker_password: str = Field(default="", repr=False, description="for a broker_url without one")
    storage_url: str = Field(default="", description="file:///folder or s3://bucket/prefix; empty: data_dir/objects")

    bind: str = Field(
        default="", description="address:port at which a container's port is published; empty: where the API listens"
    )
    behind_tls: bool = Field(default=False, description="yes: a proxy with TLS stands before the API")
    trusted_proxies: str = Field(
        default="127.0.0.1", description="addresses, comma-separated, whose X-Forwarded-For and -Proto are believed"
    )

    device: str = Field(default="auto", description='the worker\'s device: "auto", "cpu", "cuda:0" …')
    threads: int = Field(default=0, ge=0, description="CPU threads of the training process; 0: one per core")
    host_idle_seconds: float = Field(default=600, gt=0, description="how long a base model stays warm without a job")

    lease_seconds: float = Field(default=60, gt=0, description="a job is given to another worker after this silence")
    heartbeat_seconds: float = Field(default=10, gt=0, description="how often a worker renews its lease")
    poll_seconds: float = Field(default=10, gt=0, description="how often a worker looks for jobs without being told")
    sweep_seconds: float = Field(default=10, gt=0, description="how often expired leases and unsent messages are swept")
    rewake_seconds: float = Field(default=30, gt=0, description="age at which a queued job is announced again")
    preempt_after_seconds: float = Field(
        default=30, gt=0, description="a job that has waited so long makes a training of lower priority give way"
    )
    cancel_grace_seconds: float = Field(default=30, gt=0, description="from a cancel to SIGKILL of its process")
    drain_grace_seconds: float = Field(default=120, gt=0, description="time a stopping worker has for its checkpoint")

    stall_seconds: float = Field(
        default=300, gt=0, description="a training without a sign of life for so long, and ten steps, is started again"
    )
    min_free_bytes: int = Field(
        default=256 << 20, ge=0, description="of disk for the work files; a worker with less takes no job"
    )
    kernel_log: Path | None = Field(
        default=None, description="where the GPU driver's Xid events are read; empty: /dev/kmsg, where there is a GPU"
    )

    webhooks: bool = Field(default=False, description="let users have requests sent to URLs of theirs")
    webhooks_over_http: bool = Field(default=False, description="…also without TLS")
    webhook_networks: str = Field(
        default="", description="networks, by commas, that webhooks may reach although they are not public: 10.1.2.0/24"
    )

    log_format: Literal["", "text", "json"] = Field(default="", description="empty: json in production, else text")
    metrics_bind: str = Field(
        default="", description="address:port where each process answers Prometheus at /metrics; empty: nowhere"
    )
    otlp_endpoint: str = Field(
        default="", description="http://collector:4318: traces by OpenTelemetry (extra `traces`); empty: none"
    )

    alive_file: Path | None = Field(default=None, description="touched while the sweep goes round, for health checks")

    allowed_hosts: str = Field(default="", description="names in the Host header, by commas; empty: any")
    max_upload_bytes: int = Field(default=512 << 20, gt=0)
    max_dataset_rows: int = Field(default=10_000_000, gt=0)
    max_body_bytes: int = Field(default=1 << 20, gt=0, description="of a JSON request")
    max_merge_in_request_bytes: int = Field(
        default=32 << 20, ge=0, description="stacks of adapters that are no larger in all are made within the request"
    )

    requests_per_second: float = Field(
        default=100, gt=0, description="of one API key, in each process that serves HTTP; ten times as many at once"
    )
    refusals_per_second: float = Field(
        default=1, gt=0, description="requests of one address without a good key, likewise; sixty times as many at once"
    )
    max_unfinished_jobs: int = Field(default=1000, gt=0, description="of one user, unless the operator set another")
    max_running_jobs: int = Field(default=0, ge=0, description="of one user at once, likewise; 0: any number")
    max_stored_bytes: int = Field(
        default=100 << 30, gt=0, description="of one user's datasets, adapters and artifacts, likewise"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - their order is pydantic-settings'
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _Files(settings_cls)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        data = self.data_dir.expanduser().resolve()
        for name in ("database", "broker"):
            url = _with_password(getattr(self, f"{name}_url"), getattr(self, f"{name}_password"))
            object.__setattr__(self, f"{name}_url", url)
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
        password = urlsplit(url).password or ""
        if password in _PLACEHOLDERS:
            raise ValueError(f"LUTHIER_{name.upper()} has no password, or a placeholder for one; set your own secret")
        if len(password) < _SHORTEST_SECRET:
            raise ValueError(f"LUTHIER_{name.upper()}: the password has fewer than {_SHORTEST_SECRET} characters")

    def refuse_open_bind(self, host: str) -> None:
        """Keys and data are not to cross a network in the clear.

        Raises:
            ValueError: others could reach the API at `host`, and nobody has said that TLS stands before it.
        """
        reached_at = self.bind.rpartition(":")[0] if self.bind else host
        if not self.behind_tls and not _is_this_machine(reached_at.strip("[]")):
            raise ValueError(
                f"{reached_at or 'every address'} can be reached from other machines, and keys would cross the network "
                "in the clear: put a proxy with TLS before the API and say so with LUTHIER_BEHIND_TLS=yes, "
                "or listen on 127.0.0.1"
            )

    @property
    def hosts(self) -> frozenset[str]:
        """The names that requests may be sent to, in small letters; none: any. Health checks come over the loopback."""
        named = {name.strip().lower() for name in self.allowed_hosts.split(",") if name.strip()}
        return frozenset(named | {"localhost", "127.0.0.1", "::1"} if named else ())

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
