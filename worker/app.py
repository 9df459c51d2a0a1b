"""The worker process: a Celery consumer, the supervisor of one device, and a sweep."""

from typing import Any

from celery import signals

from service import logs, traces
from service.db import Database
from service.metrics import MetricsServer
from service.queue import make_celery
from service.quotas import Limits
from service.settings import Settings
from service.storage import open_storage
from service.sweep import Sweep
from worker import tasks
from worker.supervisor import Supervisor


def main() -> None:
    """Run until SIGTERM or SIGINT: then checkpoint, give the job back, and end."""
    settings = Settings()
    logs.configure(settings, "worker")
    traces.configure(settings, "worker")
    database = Database(settings.database_url, info=Limits.of(settings).info)
    storage = open_storage(settings.storage_url)
    celery = make_celery(settings.broker_url)
    supervisor = Supervisor(settings, database, storage)
    sweep = Sweep(settings, database, storage, celery)
    metrics = MetricsServer(settings)
    tasks.register(celery, supervisor)

    # Celery's own shutdown waits for the running task, which ends once the host has checkpointed.
    def draining(**_: Any) -> None:
        supervisor.drain()

    signals.worker_shutting_down.connect(draining)
    supervisor.start()
    sweep.start()
    metrics.start()
    try:
        # Threads: the task only supervises a child process. Gossip and mingle would talk to other workers for nothing.
        options = ["--pool=threads", "--concurrency=1", "--without-gossip", "--without-mingle", "--loglevel=INFO"]
        celery.worker_main(["--quiet", "worker", *options])
    finally:
        supervisor.stop()
        sweep.stop()
        metrics.stop()
        traces.shut_down()
        database.close()
