"""Who comes in, and how often: the key is checked, and requests are counted by key and by address."""

import logging

from sqlalchemy.exc import SQLAlchemyError

from service import users
from service.db import Database
from service.errors import TooMany, Unauthorized
from service.limits import Buckets, network
from service.settings import Settings
from service.users import Principal

_KEY_BURST_SECONDS, _STRANGER_BURST_SECONDS = 10, 60
_RECORDED_A_SECOND = 1 / 60  # of an address whose requests are refused by the thousand
log = logging.getLogger(__name__)


class Gate:
    """One of each process. Who holds a good key is never held up by others at the same address, who hold none."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._database = database.of_everybody()
        key_rate, stranger_rate = settings.requests_per_second, settings.refusals_per_second
        self._keys = Buckets(key_rate, max(1.0, key_rate * _KEY_BURST_SECONDS))
        self._strangers = Buckets(stranger_rate, max(1.0, stranger_rate * _STRANGER_BURST_SECONDS))
        self._recorded = Buckets(_RECORDED_A_SECOND, 1)

    def enter(self, key: str | None, address: str) -> Principal:
        """Who makes this request.

        Raises:
            Unauthorized: no key, or none that counts.
            TooMany: likewise, and too often from this address.
        """
        # A transaction of its own: the one that does the work must not wait for a slow body.
        with self._database.reading() as session:
            try:
                principal = users.authenticate(session, key)
            except Unauthorized:
                _take(self._strangers, network(address), "this address sent too many requests without a valid key")
                raise
        if principal.is_stale:
            self._note_use(principal.key_id)
        return principal

    def count(self, principal: Principal) -> None:
        """Raises TooMany: too many requests with this key."""
        _take(self._keys, principal.key_id, "too many requests with this key")

    def is_recorded(self, address: str) -> bool:
        """Whether one of many refusals goes into the audit log: one a minute and address."""
        return self._recorded.take(network(address)) is None

    def _note_use(self, key_id: str) -> None:
        try:
            with self._database.unit_of_work() as session:
                users.note_use(session, key_id)
        except SQLAlchemyError as error:  # no reason to refuse who only reads
            log.warning("the use of %s could not be noted: %s", key_id, type(error).__name__)


def _take(buckets: Buckets, name: str, message: str) -> None:
    seconds = buckets.take(name)
    if seconds is not None:
        raise TooMany(f"{message}; try again in {seconds} s", code="rate_limited", retry_after=seconds)
