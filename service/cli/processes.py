"""One process each: what containers run, and what `luthier up` supervises."""

import os
import sys
import time
from typing import Annotated

import httpx
import typer

from service import logs, traces
from service.settings import Settings


def api(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8000,
) -> None:
    """Serve HTTP."""
    settings = Settings()
    refuse_open_bind(settings, host)
    logs.configure(settings, "api")
    traces.configure(settings, "api")
    import uvicorn  # a quarter of a second that no other command needs

    uvicorn.run(
        "service.app:create_app",
        factory=True,
        host=host,
        port=port,
        log_level="info",
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_graceful_shutdown=5,
        http="service.api.connection:Connection",
    )


def refuse_open_bind(settings: Settings, host: str) -> None:
    """End the command when other machines could reach the API without TLS."""
    try:
        settings.refuse_open_bind(host)
    except ValueError as error:
        typer.echo(f"not started: {error}", err=True)
        raise typer.Exit(1) from None


def worker() -> None:
    """Train and merge: one job at a time on one device."""
    # Another program, because this one is not to know the worker: the import rule has one direction.
    os.execv(sys.executable, [sys.executable, "-m", "worker"])  # noqa: S606


def migrate() -> None:
    """Bring the database's schema up to date, and make the roles whose passwords are set."""
    import migrations  # Alembic takes half a second, which the processes that serve do not need
    from migrations import roles

    settings = Settings()
    migrations.upgrade(settings.database_url)
    if settings.api_database_password and settings.worker_database_password:
        roles.provision(settings.database_url, settings.api_database_password, settings.worker_database_password)


def wait_ready(
    url: Annotated[str, typer.Option(help="where the API listens")] = "http://127.0.0.1:8000",
    timeout: Annotated[float, typer.Option(help="seconds to wait")] = 30,
) -> None:
    """Wait until the service answers /readyz with 200."""
    deadline = time.monotonic() + timeout
    while not is_ready(url):
        if time.monotonic() > deadline:
            typer.echo(f"{url} is not ready after {timeout:g} s", err=True)
            raise typer.Exit(1)
        time.sleep(0.1)


def is_ready(url: str) -> bool:
    """Whether the service at `url` answers and has all it needs."""
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
