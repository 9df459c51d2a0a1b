"""Sends webhooks, in every API process where the operator allows them; any number of couriers may run at once.

A thread claims messages in one short transaction, others send them while none is open, and a second one records what
came of it. A courier that dies in between leaves a message that is sent again.
"""

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from service import metrics, webhooks
from service.db import Database
from service.settings import Settings
from service.webhook_addresses import Policy
from service.webhook_delivery import send

log = logging.getLogger(__name__)
_SENDERS = 8
_LOOK_SECONDS = 2.0  # jobs end in other processes, which cannot wake this one
_TIDY_SECONDS = 3600.0


class Courier:
    """A background thread; `start`, then `stop`. Does nothing where webhooks are off."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database, self._policy = database, Policy.of(settings)
        self._on = settings.webhooks
        self._tls = httpx.create_ssl_context() if self._on else None
        self._stopping = threading.Event()
        self._busy: set[str] = set()  # owners; changed under `_lock`
        self._lock = threading.Lock()
        self._senders = ThreadPoolExecutor(_SENDERS, thread_name_prefix="webhook")
        self._thread = threading.Thread(target=self._loop, name="courier", daemon=True)
        self._tidy_at = 0.0

    def start(self) -> None:
        if self._on:
            self._thread.start()

    def stop(self) -> None:
        """Attempts under way get the seconds that each has."""
        self._stopping.set()
        webhooks.messages_written.set()
        if self._thread.is_alive():
            self._thread.join()
        self._senders.shutdown()

    def _loop(self) -> None:
        while not self._stopping.is_set():
            webhooks.messages_written.clear()
            try:
                self._claim()
                self._tidy()
            except (OperationalError, InterfaceError, PoolTimeout) as error:
                log.warning("courier: the database does not answer: %s", type(error).__name__)
            except Exception:  # a thread that ended would send nothing any more
                log.exception("courier")
            webhooks.messages_written.wait(_LOOK_SECONDS)

    def _claim(self) -> None:
        with self._lock:
            busy = set(self._busy)
        if len(busy) >= _SENDERS:
            return
        with self._database.unit_of_work() as session:
            claimed = webhooks.claim_due(session, _SENDERS - len(busy), busy)
        for due in claimed:
            with self._lock:
                self._busy.add(due.owner_id)
            self._senders.submit(self._deliver, due)

    def _deliver(self, due: webhooks.Due) -> None:
        assert self._tls is not None  # noqa: S101 - for the type checker: nothing is claimed where webhooks are off
        try:
            outcome = send(due.url, due.secret, due.id, due.body, self._policy, self._tls)
            metrics.WEBHOOK_ATTEMPTS.labels("delivered" if outcome.delivered else "failed").inc()
            # Not the URL: it may hold a token.
            log.info("%s of %s, attempt %d: %s", due.id, due.webhook_id, due.attempts, outcome.error or outcome.status)
            with self._database.unit_of_work() as session:
                webhooks.settle(session, due, outcome)
        except Exception:  # the message is claimed for a minute, then it is sent again
            log.exception("courier: %s", due.id)
        finally:
            with self._lock:
                self._busy.discard(due.owner_id)
            webhooks.messages_written.set()  # the owner's next one

    def _tidy(self) -> None:
        if time.monotonic() >= self._tidy_at:
            with self._database.unit_of_work() as session:
                webhooks.forget_old(session)
            self._tidy_at = time.monotonic() + _TIDY_SECONDS
