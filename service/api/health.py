"""/healthz and /readyz: for load balancers and container engines, without a key."""

from collections.abc import Callable

import anyio
from fastapi import APIRouter, Response
from sqlalchemy import text

from service import queue, schemas
from service.api.request import Inside, Parts

router = APIRouter(tags=["health"])
_PATIENCE_SECONDS = 3.0


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> schemas.Alive:
    return schemas.Alive()


@router.get(
    "/readyz",
    summary="Can it serve?",
    responses={503: {"model": schemas.Readiness, "description": "Database or object store do not answer"}},
)
async def readyz(parts: Inside, response: Response) -> schemas.Readiness:
    """Without the broker it serves all the same: jobs are in the database, and workers look there by themselves."""
    found: dict[str, str] = {}

    async def check(name: str, probe: Callable[[], None]) -> None:
        found[name] = "does not answer"
        with anyio.move_on_after(_PATIENCE_SECONDS):
            try:
                await anyio.to_thread.run_sync(probe, abandon_on_cancel=True)
            except Exception as error:  # whatever it is, it says that this part cannot be used
                found[name] = f"failed: {type(error).__name__}"
            else:
                found[name] = "ok"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(check, "database", lambda: _probe_database(parts))
        tasks.start_soon(check, "storage", parts.storage.check)
        tasks.start_soon(check, "broker", lambda: queue.check(parts.celery))
    if found["database"] != "ok" or found["storage"] != "ok":
        response.status_code = 503
        return schemas.Readiness(status="unavailable", parts=found)
    return schemas.Readiness(status="ready" if found["broker"] == "ok" else "degraded", parts=found)


def _probe_database(parts: Parts) -> None:
    with parts.database.reading() as session:
        session.execute(text("SELECT 1 FROM users LIMIT 1"))
