"""The Celery app as a producer, and the outbox that makes its messages follow the commit.

A message only says "there may be work": the job's row is the truth. Messages are acknowledged before they run,
a lost one is replaced by the sweep, a doubled one finds nothing to claim.
"""

import logging
import threading
from typing import Any

from celery import Celery
from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from lora_engine import failpoints
from service.db import Database, after_commit
from service.models import OutboxMessage

WAKE = "luthier.wake"
log = logging.getLogger(__name__)
# Set when the outbox has something; the sweep of this process sends it at once.
outbox_filled = threading.Event()


def make_celery(broker_url: str) -> Celery:
    """Settings that keep Celery on Redis to what it does reliably; see CONTRIBUTING, "The message is a hint"."""
    app = Celery("luthier", broker=broker_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_ignore_result=True,
        task_acks_late=False,
        task_default_queue="luthier",
        task_publish_retry=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_concurrency=1,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # a worker without a broker polls; it does not give up
        # One try: Celery's own would hold up the sweep for six seconds, which comes back by itself.
        broker_transport_options={
            "socket_timeout": 5, "socket_connect_timeout": 5,
            "max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0,
        },
    )  # fmt: skip
    return app


def enqueue(session: Session, job_id: str) -> None:
    """Announce a job once this unit of work has committed."""
    session.execute(insert(OutboxMessage.__table__).values(job_id=job_id))  # type: ignore[arg-type]
    after_commit(session, outbox_filled.set)


def relay(database: Database, celery: Celery) -> int:
    """Send what the outbox holds, then delete it; returns how many were sent.

    A crash between the two sends twice, which is harmless. No transaction is open while the broker is spoken to.

    Raises:
        kombu's OperationalError: the broker does not answer; everything unsent stays.
    """
    with database.reading() as session:
        messages = session.execute(
            select(OutboxMessage.id, OutboxMessage.job_id).order_by(OutboxMessage.id).limit(100)
        ).all()
    sent: list[int] = []
    try:
        for message in messages:
            failpoints.reach("relay.before_send")
            send(celery, message.job_id)
            sent.append(message.id)
            failpoints.reach("relay.after_send")
    finally:
        if sent:  # one commit for all of them
            with database.unit_of_work() as session:
                session.execute(delete(OutboxMessage).where(OutboxMessage.id.in_(sent)))
    return len(messages)


def send(celery: Celery, job_id: str) -> Any:
    return celery.send_task(WAKE, kwargs={"job_id": job_id}, ignore_result=True, retry=False)


def check(celery: Celery) -> None:
    """Raises kombu's OperationalError when the broker does not answer."""
    with celery.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
