"""Webhooks: where owners want to be told of ended jobs, and what has to be sent to them.

A message is a row that is written in the transaction which ends the job, so that none is lost and none tells of what
did not happen. `service.courier` sends it, at least once: its id is the same every time.
"""

import json
import os
import random
import re
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Select, func, select, update
from sqlalchemy import delete as delete_rows
from sqlalchemy.orm import Session

from lora_engine.errors import SpecError
from service.db import after_commit, newest, now
from service.errors import Conflict, Invalid, NotFound
from service.models import TERMINAL, Adapter, Artifact, Job, Webhook, WebhookDelivery, new_id
from service.webhook_addresses import Policy, Refused, addresses, parse
from service.webhook_delivery import SECONDS, Outcome, new_secret

MAX_WEBHOOKS = 10  # of one owner
# Seconds before the second, third … attempt: the schedule that Standard Webhooks recommends, three days in all.
RETRIES = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
KEPT_SECONDS = 30 * 86_400.0  # a delivery, whatever came of it
_CLAIM_SECONDS = 60.0  # an attempt that nobody tells of in this time is made again
_GONE = 410
_JOB_EVENTS = tuple(f"job.{state}" for state in TERMINAL)
# The same for trainings, in the words of OpenAI's API.
EVENT_TYPES = (*_JOB_EVENTS, *(f"fine_tuning.{event}" for event in _JOB_EVENTS))
_NAME = re.compile(r"(?=.*[^ .])[A-Za-z0-9 ._-]{1,100}")

# Set when a message was written by this process; its courier sends it at once.
messages_written = threading.Event()


@dataclass(frozen=True, kw_only=True)
class WebhookRequest:
    """The body of ``POST /webhooks``.

    Attributes:
        url: https, on port 443 or one from 1024, with a name that has public addresses only.
        event_types: job.succeeded, job.failed, job.cancelled, or the same with "fine_tuning." before it, which tell
            of trainings alone.
        name: for its owner.
    """

    url: str
    event_types: Sequence[str] = _JOB_EVENTS
    name: str = "webhook"

    def __post_init__(self) -> None:
        _check_fields(self.event_types, self.name)


@dataclass(frozen=True, kw_only=True)
class WebhookChange:
    """The body of ``PATCH /webhooks/{webhook_id}``: what is left out stays as it is.

    Attributes:
        enabled: false: nothing is sent, and nothing is kept for later: what waits is dead, and can be sent again.
    """

    url: str | None = None
    event_types: Sequence[str] | None = None
    name: str | None = None
    enabled: bool | None = None

    def __post_init__(self) -> None:
        _check_fields(self.event_types, self.name)


@dataclass(frozen=True)
class Due:
    """A message whose next attempt is this one's to make."""

    id: str
    owner_id: str
    webhook_id: str
    url: str
    secret: str
    body: str
    attempts: int


def check_url(url: str | None, policy: Policy) -> str | None:
    """The URL as it is kept. Looks its name up, so no transaction should be open. Raises Invalid."""
    if url is None:
        return None
    try:
        target = parse(url, policy)
        addresses(target, policy, SECONDS)
    except Refused as refusal:
        raise Invalid(f"url: {refusal}", param="url", code="url_not_allowed") from None
    return str(target)


def create(session: Session, owner_id: str, request: WebhookRequest, url: str) -> Webhook:
    """`url` has been checked. Raises Conflict when there are too many."""
    count = session.scalar(select(func.count()).where(Webhook.owner_id == owner_id)) or 0
    if count >= MAX_WEBHOOKS:
        raise Conflict(f"there are {MAX_WEBHOOKS} webhooks already; delete one", code="too_many_webhooks")
    webhook = Webhook(
        id=new_id("webhook"), owner_id=owner_id, name=request.name, url=url,
        event_types=list(dict.fromkeys(request.event_types)), secret=new_secret(os.urandom(32)),
    )  # fmt: skip
    session.add(webhook)
    session.flush()
    return webhook


def get(session: Session, owner_id: str, webhook_id: str) -> Webhook:
    """Raises NotFound, also for another owner's webhook."""
    return _found(session, owner_id, webhook_id, select(Webhook))


def _locked(session: Session, owner_id: str, webhook_id: str) -> Webhook:
    """`get`, after those transactions that announce something to it, and before others that will."""
    return _found(session, owner_id, webhook_id, select(Webhook).with_for_update())


def _found(session: Session, owner_id: str, webhook_id: str, rows: Select[Webhook]) -> Webhook:
    webhook = session.scalar(rows.where(Webhook.id == webhook_id, Webhook.owner_id == owner_id))
    if webhook is None:
        raise NotFound(f"there is no webhook {webhook_id[:80]!r}")
    return webhook


def page(session: Session, owner_id: str, after: str | None, limit: int) -> tuple[list[Webhook], bool]:
    """The owner's, newest first, below the id `after`; and whether there are more."""
    rows = select(Webhook).where(Webhook.owner_id == owner_id)
    return newest(session, rows, Webhook.id, after, limit)


def change(session: Session, owner_id: str, webhook_id: str, wanted: WebhookChange, url: str | None) -> Webhook:
    """`url` has been checked. Raises NotFound."""
    webhook = _locked(session, owner_id, webhook_id)
    webhook.url = url or webhook.url
    webhook.name = wanted.name or webhook.name
    if wanted.event_types is not None:
        webhook.event_types = list(dict.fromkeys(wanted.event_types))
    if wanted.enabled is not None:
        webhook.enabled = wanted.enabled
        if not wanted.enabled:
            _drop_waiting(session, webhook_id)
    return webhook


def delete(session: Session, owner_id: str, webhook_id: str) -> None:
    """With its deliveries. Raises NotFound."""
    webhook = _locked(session, owner_id, webhook_id)
    session.execute(delete_rows(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook.id))
    session.delete(webhook)


def deliveries(
    session: Session, owner_id: str, webhook_id: str, after: str | None, limit: int, *, state: str | None = None
) -> tuple[list[WebhookDelivery], bool]:
    """What was sent or is to be, newest first; and whether there is more. Raises NotFound."""
    get(session, owner_id, webhook_id)
    rows = select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.owner_id == owner_id)
    if state is not None:
        rows = rows.where(WebhookDelivery.state == state)
    return newest(session, rows, WebhookDelivery.id, after, limit)


def delivery(session: Session, owner_id: str, webhook_id: str, delivery_id: str) -> WebhookDelivery:
    """Raises NotFound."""
    found = session.scalar(
        select(WebhookDelivery)
        .where(WebhookDelivery.id == delivery_id, WebhookDelivery.webhook_id == webhook_id)
        .where(WebhookDelivery.owner_id == owner_id)
    )
    if found is None:
        raise NotFound(f"there is no delivery {delivery_id[:80]!r} of this webhook")
    return found


def resend(session: Session, owner_id: str, webhook_id: str, delivery_id: str) -> WebhookDelivery:
    """Send it as if for the first time, under the same id: a dead letter, or one that the receiver has lost.

    Raises:
        NotFound: no such delivery.
        Conflict: the webhook is disabled.
    """
    found = delivery(session, owner_id, webhook_id, delivery_id)
    if not get(session, owner_id, webhook_id).enabled:
        raise Conflict("the webhook is disabled; enable it first", code="webhook_disabled")
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.id == found.id)
        .values(state="pending", attempts=0, next_attempt_at=now(), delivered_at=None)
    )
    session.refresh(found)
    after_commit(session, messages_written.set)
    return found


def announce(session: Session, job_id: str) -> None:
    """Write what the owner's webhooks are to be told of a job that this transaction ends."""
    job = session.execute(select(Job.owner_id, Job.kind, Job.state).where(Job.id == job_id)).one()
    hooks = select(Webhook.id, Webhook.event_types).where(Webhook.owner_id == job.owner_id, Webhook.enabled)
    # None of them may be deleted before the commit: deliveries refer to them, and this transaction must not fail.
    hooks = hooks.order_by(Webhook.id).with_for_update(read=True, key_share=True)
    known = {f"job.{job.state}"} | ({f"fine_tuning.job.{job.state}"} if job.kind == "train" else set())
    for hook in session.execute(hooks).all():
        for event_type in known.intersection(hook.event_types):
            _write(session, job_id, job.owner_id, hook.id, event_type)


def _write(session: Session, job_id: str, owner_id: str, webhook_id: str, event_type: str) -> None:
    message_id = new_id("message")
    data = {"id": job_id} if event_type.startswith("fine_tuning.") else _job_data(session, job_id)
    body = {
        "id": message_id,
        "object": "event",
        "type": event_type,
        "created_at": int(session.scalar(select(now())) or 0),
        "data": data,
    }
    session.add(
        WebhookDelivery(
            id=message_id, webhook_id=webhook_id, owner_id=owner_id, job_id=job_id, event_type=event_type,
            body=json.dumps(body, separators=(",", ":")),
        )
    )  # fmt: skip
    session.flush()
    after_commit(session, messages_written.set)


def _job_data(session: Session, job_id: str) -> dict[str, object]:
    """What is stable, and tells nothing of the data: whoever wants more asks the API."""
    job = session.execute(select(Job.kind, Job.state, Job.error_code, Job.error_category).where(Job.id == job_id)).one()
    error = None if job.error_code is None else {"code": job.error_code, "category": job.error_category}
    return {
        "id": job_id,
        "kind": job.kind,
        "status": job.state,
        "adapter": session.scalar(select(Adapter.id).where(Adapter.job_id == job_id)),
        "artifact": session.scalar(select(Artifact.id).where(Artifact.job_id == job_id)),
        "error": error,
    }


def claim_due(session: Session, limit: int, busy: Collection[str]) -> list[Due]:
    """Take the messages whose time has come: one of each owner, none of the `busy` owners, at most `limit`.

    One at a time of each owner, so that a receiver that never answers holds up nobody else's messages.
    """
    due = (WebhookDelivery.state == "pending", WebhookDelivery.next_attempt_at <= now())
    firsts = (
        select(func.min(WebhookDelivery.id))
        .join(Webhook, Webhook.id == WebhookDelivery.webhook_id)
        .where(*due, Webhook.enabled, WebhookDelivery.owner_id.not_in(busy))
        .group_by(WebhookDelivery.owner_id)
    )
    chosen = select(WebhookDelivery.id).where(WebhookDelivery.id.in_(firsts), *due)
    candidates = chosen.order_by(WebhookDelivery.next_attempt_at).limit(limit)
    taken = candidates.with_for_update(skip_locked=True).cte("candidates")
    claimed = (
        update(WebhookDelivery)
        .where(WebhookDelivery.id.in_(select(taken.c.id)), *due)
        .values(attempts=WebhookDelivery.attempts + 1, next_attempt_at=now() + _CLAIM_SECONDS)
        .returning(WebhookDelivery.id)
        .execution_options(synchronize_session=False)
    )
    ids = list(session.scalars(claimed))
    rows = select(WebhookDelivery, Webhook).join(Webhook, Webhook.id == WebhookDelivery.webhook_id)
    return [
        Due(row.id, row.owner_id, hook.id, hook.url, hook.secret, row.body, row.attempts)
        for row, hook in session.execute(rows.where(WebhookDelivery.id.in_(ids)))
    ]


def settle(session: Session, due: Due, outcome: Outcome) -> None:
    """Record what came of an attempt. Of one that is no longer the last, only a success counts."""
    told = {"last_status": outcome.status, "last_error": outcome.error}
    if outcome.delivered:
        undelivered = (WebhookDelivery.id == due.id, WebhookDelivery.state != "delivered")
        values = told | {"state": "delivered", "delivered_at": now()}
        session.execute(update(WebhookDelivery).where(*undelivered).values(**values))
        return
    gone = outcome.status == _GONE and _is_url_of(session, due)
    pending = (WebhookDelivery.id == due.id, WebhookDelivery.state == "pending")
    latest = (*pending, WebhookDelivery.attempts == due.attempts)
    if gone or due.attempts > len(RETRIES):
        session.execute(update(WebhookDelivery).where(*latest).values(**told, state="dead"))
        if gone:
            session.execute(update(Webhook).where(Webhook.id == due.webhook_id).values(enabled=False))
            _drop_waiting(session, due.webhook_id)
        return
    # Spread, so that a receiver that comes back is not met by everything at once.
    pause = RETRIES[due.attempts - 1] * random.uniform(0.8, 1.2)  # noqa: S311
    session.execute(update(WebhookDelivery).where(*latest).values(**told, next_attempt_at=now() + pause))


def _is_url_of(session: Session, due: Due) -> bool:
    """Whether the webhook still has the URL that was tried; it is locked then."""
    rows = select(Webhook.id).where(Webhook.id == due.webhook_id, Webhook.url == due.url)
    return session.scalar(rows.with_for_update()) is not None


def _drop_waiting(session: Session, webhook_id: str) -> None:
    waiting = (WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.state == "pending")
    dropped = update(WebhookDelivery).where(*waiting).values(state="dead", last_error="the webhook was disabled")
    session.execute(dropped.execution_options(synchronize_session=False))


def forget_old(session: Session) -> None:
    """Deliveries are kept for KEPT_SECONDS, whatever came of them."""
    session.execute(delete_rows(WebhookDelivery).where(WebhookDelivery.created_at < now() - KEPT_SECONDS))


def _check_fields(event_types: Sequence[str] | None, name: str | None) -> None:
    """Raises SpecError."""
    if event_types is not None and not 1 <= len(event_types) <= len(EVENT_TYPES):
        raise SpecError(f"event_types: expected 1 to {len(EVENT_TYPES)}", field="event_types")
    for event_type in event_types or ():
        if event_type not in EVENT_TYPES:
            known = ", ".join(EVENT_TYPES)
            raise SpecError(f"event_types: {event_type[:40]!r} must be one of {known}", field="event_types")
    if name is not None and not _NAME.fullmatch(name):
        raise SpecError("name: 1 to 100 ASCII letters, digits, spaces, dots, dashes or underscores", field="name")
