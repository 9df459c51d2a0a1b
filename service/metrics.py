"""What Prometheus is told: counters of this process, and the state of jobs and queues from the database.

Operators alone see it: it is answered at an address of its own (`LUTHIER_METRICS_BIND`), never by the API. Labels are
kinds, states, routes and devices: nothing that grows with users, and nothing of theirs.
"""

import logging
import threading
from collections.abc import Iterable
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client import start_http_server as serve_http
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.db import Database, now
from service.models import ACTIVE, TERMINAL, Job, JobEvent, OutboxMessage, WebhookDelivery
from service.settings import Settings

log = logging.getLogger(__name__)

HTTP_SECONDS = Histogram(
    "luthier_http_response_seconds",
    "From a request's first byte to its answer's, by route",
    ["method", "route", "status"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    registry=None,
)
JOBS_ENDED = Counter("luthier_jobs_ended", "Jobs that this process ended", ["kind", "state"], registry=None)
FENCES = Counter("luthier_fences", "Effects of attempts that were refused, because the job was theirs no more",
                 registry=None)  # fmt: skip
LEASES_EXPIRED = Counter("luthier_leases_expired", "Leases that ran out and were reaped", registry=None)
WEBHOOK_ATTEMPTS = Counter("luthier_webhook_attempts", "Webhook messages sent, by outcome", ["outcome"], registry=None)
_OF_THIS_PROCESS = (HTTP_SECONDS, JOBS_ENDED, FENCES, LEASES_EXPIRED, WEBHOOK_ATTEMPTS)


class MetricsServer:
    """Answers at `LUTHIER_METRICS_BIND` while it runs; `start`, then `stop`. Nowhere when that is empty.

    With a `database`, what all processes share is told too: one scrape of one API process is enough for it.
    """

    def __init__(self, settings: Settings, database: Database | None = None) -> None:
        self._bind = settings.metrics_bind
        self.registry = CollectorRegistry()
        for collector in _OF_THIS_PROCESS:
            self.registry.register(collector)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        if database is not None:
            self.registry.register(SharedState(database))
        self._server: WSGIServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int | None:
        return None if self._server is None else self._server.server_port

    def start(self) -> None:
        """Raises OSError when the address is taken."""
        if self._bind:
            host, _, port = self._bind.rpartition(":")
            self._server, self._thread = serve_http(int(port), host.strip("[]") or "127.0.0.1", self.registry)

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class SharedState(Collector):
    """What stands in the database, read at every scrape."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering it reads nothing

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("luthier_database_up", "1 when the database answered this scrape")
        try:
            with self._database.reading() as session:
                families = [*_jobs(session), *_outboxes(session), *_trainings(session)]
        except SQLAlchemyError as error:
            log.warning("metrics: the database does not answer: %s", type(error).__name__)
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        return [up, *families]


def _jobs(session: Session) -> list[Metric]:
    jobs = GaugeMetricFamily("luthier_jobs", "Jobs that have not ended", labels=["kind", "state"])
    counted = select(Job.kind, Job.state, func.count()).where(Job.state.not_in(TERMINAL)).group_by(Job.kind, Job.state)
    for kind, state, count in session.execute(counted):
        jobs.add_metric([kind, state], count)
    claimable = (Job.state == "queued", Job.run_after <= now())
    oldest = session.scalar(select(now() - func.min(Job.run_after)).where(*claimable))
    held = session.scalar(select(func.count()).where(Job.lease_until.is_not(None)))
    late = session.scalar(select(func.count()).where(Job.lease_until < now()))
    return [
        jobs,
        _gauge("luthier_queue_age_seconds", "How long the first job that could start has waited", oldest),
        _gauge("luthier_leases_held", "Jobs that a worker holds", held),
        _gauge("luthier_leases_overdue", "Leases that have run out and wait for a sweep", late),
    ]


def _outboxes(session: Session) -> list[Metric]:
    unsent = session.execute(select(func.count(), now() - func.min(OutboxMessage.created_at))).one()
    due = (WebhookDelivery.state == "pending", WebhookDelivery.next_attempt_at <= now())
    webhooks = session.execute(select(func.count(), now() - func.min(WebhookDelivery.next_attempt_at)).where(*due))
    count, age = webhooks.one()
    return [
        _gauge("luthier_outbox_messages", "Messages for the broker that are not sent yet", unsent[0]),
        _gauge("luthier_outbox_age_seconds", "Age of the oldest of them", unsent[1]),
        _gauge("luthier_webhooks_due", "Webhook messages whose time to be sent has come", count),
        _gauge("luthier_webhooks_late_seconds", "How long the first of them has been due", age),
    ]


def _trainings(session: Session) -> list[Metric]:
    """The newest measurement of each training that runs, as its worker wrote it into the event log."""
    names = {
        "seconds": ("luthier_step_seconds", "Wall clock of the newest step of the training on a device"),
        "tokens_per_second": ("luthier_tokens_per_second", "Of that step"),
        "peak_bytes": ("luthier_peak_memory_bytes", "Of the device, or of the process on a CPU, at that step"),
    }
    families = {name: GaugeMetricFamily(*told, labels=["device"]) for name, told in names.items()}
    newest = (
        select(JobEvent.data)
        .where(JobEvent.job_id == Job.id, JobEvent.type == "metrics")
        .order_by(JobEvent.seq.desc())
        .limit(1)
        .correlate(Job)
        .scalar_subquery()
    )
    for device, point in session.execute(select(Job.device_slot, newest).where(Job.state.in_(ACTIVE))):
        for name, family in families.items():
            if point and point.get(name) is not None:
                family.add_metric([device or ""], point[name])
    return list(families.values())


def _gauge(name: str, documentation: str, value: float | None) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=float(value or 0))
