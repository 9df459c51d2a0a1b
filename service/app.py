"""The HTTP application: its parts, its routes, and what is answered to errors."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from service import queue
from service.api import (
    adapter_jobs,
    adapter_uploads,
    adapters,
    aliases,
    artifacts,
    audit,
    base_models,
    datasets,
    erasures,
    health,
    jobs,
    keys,
    merges,
    users,
    webhooks,
)
from service.api.edge import Edge
from service.api.errors import documented, install
from service.api.observed import Observed
from service.api.request import Parts
from service.courier import Courier
from service.db import Database
from service.metrics import MetricsServer
from service.quotas import Limits
from service.settings import Settings
from service.storage import open_storage
from service.sweep import Sweep

_DESCRIPTION = """Fine-tunes language models with LoRA and QLoRA, and hands every user their own adapters.

Every request but the health checks carries `Authorization: Bearer luthier_…`. Every error has one shape:
`{"error": {"message", "type", "param", "code", "category"}}`."""


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application behind `luthier api`. Nothing is opened before it starts."""
    known = settings or Settings()
    # Its pages come with their scripts: the plain ones load them from other people's servers.
    app = FastAPIOffline(
        title="Luthier",
        version=version("luthier"),
        description=_DESCRIPTION,
        lifespan=lambda app: _lifespan(app, known),
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Edge, allowed_hosts=known.hosts)
    app.add_middleware(Observed)  # around the edge, so that it sees its refusals
    install(app)
    app.include_router(health.router)
    results = (aliases, merges, adapter_jobs, adapter_uploads, adapters, artifacts)
    accounts = (keys, users, erasures, audit)
    for module in (datasets, jobs, *results, base_models, webhooks, *accounts):
        app.include_router(module.router, responses=documented(401, 403, 422, 429, 503))
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI, settings: Settings) -> AsyncIterator[None]:
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url, info=Limits.of(settings).info)
    storage, celery = open_storage(settings.storage_url), queue.make_celery(settings.broker_url)
    parts = Parts(settings, database.of_callers(), storage, celery)
    app.state.parts = parts
    background = (
        MetricsServer(settings, database),
        Sweep(settings, database, storage, celery, erases=True),
        Courier(settings, database),
    )
    for part in background:
        part.start()
    try:
        yield
    finally:
        for part in reversed(background):
            part.stop()
        database.close()
