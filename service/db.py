"""The database: one engine per process, transactions with one edge, and the database's own clock.

SQLite runs in WAL mode with full fsync; transactions that write begin as IMMEDIATE, because a deferred one that
turns into a writer fails at once instead of waiting. PostgreSQL is told with every transaction whose rows it may
show: its row-level security is a second wall behind the owner in every query. SQLite has none.
"""

import select
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from typing import Any, Self, TypeVar

import psycopg
from sqlalchemy import Connection, Engine, Float, Select, create_engine, event, make_url
from sqlalchemy.exc import InvalidatePoolError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import InstrumentedAttribute, Session
from sqlalchemy.sql.functions import FunctionElement

from lora_engine import failpoints

T = TypeVar("T")
_AFTER_COMMIT = "luthier.after_commit"
_WRITES = "luthier_writes"
# Nobody waits for long: not for a lock, not for a statement, and not for a process that stands still in a transaction.
_LIMITS = "-c lock_timeout=5s -c statement_timeout=30s -c idle_in_transaction_session_timeout=30s"
_OF_CALLERS = "luthier_of_callers"
_IDLE_SINCE = "luthier_idle_since"
_PING_AFTER_SECONDS = 5.0
# Whose request this is: set once the key was checked, and followed into the threads that work on it.
caller: ContextVar[str] = ContextVar("caller", default="")


class now(FunctionElement[float]):  # noqa: N801 - reads as the SQL function that it is
    """Unix seconds by the database's clock, also inside a long transaction. Workers' clocks decide nothing."""

    type = Float(53)
    inherit_cache = True


@compiles(now, "postgresql")
def _now_postgresql(*_: Any, **__: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


@compiles(now, "sqlite")
def _now_sqlite(*_: Any, **__: Any) -> str:
    # unixepoch('subsec') is NULL on the SQLite 3.40 of Debian 12.
    return "((julianday('now') - 2440587.5) * 86400.0)"


class Database:
    """The engine and its two kinds of transaction."""

    def __init__(self, url: str, *, pool_size: int = 10, info: Mapping[Any, Any] | None = None) -> None:
        """`info` is what every session's `info` begins with."""
        parsed = make_url(url)
        self._info = dict(info or {})
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        options: dict[str, Any] = {"pool_size": pool_size, "max_overflow": 20}
        options["hide_parameters"] = True  # an error's text goes to the log; the values are people's data
        if self.is_sqlite:
            options["connect_args"] = {"timeout": 10, "check_same_thread": False}
        else:
            # A full pool or a dead server answers 503 soon instead of holding the request.
            # The keepalives end a connection whose other side has vanished without a word.
            alive = {"keepalives_idle": 20, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}
            limits = f"{parsed.query.get('options', '')} {_LIMITS}"
            # The driver begins nothing by itself: `_begin_postgresql` does, in one round trip with what is set for it.
            connect = {"connect_timeout": 5, "options": limits, "autocommit": True, **alive}
            options |= {"pool_timeout": 2, "connect_args": connect}
        self.engine: Engine = create_engine(parsed, **options)
        if self.is_sqlite:
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            event.listen(self.engine, "begin", _begin_postgresql)
            event.listen(self.engine, "checkin", _note_idle)
            event.listen(self.engine, "checkout", _check_alive)

    def of_callers(self) -> Self:
        """The same database, in which each transaction sees the rows of its `caller` alone, or none without one.

        All others see everything: the sweep, workers, the console, and the look at a key that finds out who calls.
        """
        view = copy(self)
        view.engine = self.engine.execution_options(**{_OF_CALLERS: True})
        return view

    def of_everybody(self) -> Self:
        """The way back: the inside's own work within a request."""
        view = copy(self)
        view.engine = self.engine.execution_options(**{_OF_CALLERS: False})
        return view

    @contextmanager
    def unit_of_work(self) -> Iterator[Session]:
        """One transaction that writes: committed at the end of the block, or not at all.

        What `after_commit` was given runs once the commit has happened.
        """
        engine = self.engine.execution_options(**{_WRITES: True})
        with Session(engine, expire_on_commit=False, info=self._info) as session:
            with session.begin():
                yield session
            callbacks: list[Callable[[], None]] = session.info.pop(_AFTER_COMMIT, [])
        if callbacks:
            failpoints.reach("commit.before_wake")
        for callback in callbacks:
            callback()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One transaction that only reads, rolled back at the end."""
        with Session(self.engine, expire_on_commit=False, info=self._info) as session:
            yield session

    def scrub(self) -> None:
        """What was deleted leaves SQLite's log too, unless somebody reads just then. PostgreSQL has its vacuum."""
        if self.is_sqlite:
            connection = self.engine.raw_connection()
            try:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                connection.close()

    def close(self) -> None:
        self.engine.dispose()


def newest(
    session: Session, rows: Select[T], key: InstrumentedAttribute[str], after: str | None, limit: int
) -> tuple[list[T], bool]:
    """At most `limit` of `rows`, by `key` descending, below `after`; and whether there are more.

    It costs the same however deep the page lies.
    """
    if after is not None:
        rows = rows.where(key < after)
    found = list(session.scalars(rows.order_by(key.desc()).limit(limit + 1)))
    return found[:limit], len(found) > limit


def after_commit(session: Session, callback: Callable[[], None]) -> None:
    """Run `callback` when the unit of work has committed; never when it has not."""
    callbacks = session.info.setdefault(_AFTER_COMMIT, [])
    if callback not in callbacks:
        callbacks.append(callback)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGINs are deferred; `_begin_sqlite` decides instead
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000", "foreign_keys=ON", "secure_delete=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    owner = caller.get() if connection.get_execution_options().get(_OF_CALLERS) else "*"
    quoted = owner.replace("'", "''")
    connection.exec_driver_sql(f"BEGIN; SELECT set_config('luthier.owner', '{quoted}', true)")


def _note_idle(_connection: Any, record: Any) -> None:
    record.info[_IDLE_SINCE] = time.monotonic()


def _check_alive(connection: Any, record: Any, _proxy: Any) -> None:
    """Before it is used again. That a server hung up can be read off the socket; only a long silence costs a ping.

    Raises:
        InvalidatePoolError: it is dead, and probably the others too; the pool makes a new one.
    """
    since = record.info.pop(_IDLE_SINCE, None)
    if since is None:
        return  # it was opened just now
    try:
        if time.monotonic() - since > _PING_AFTER_SECONDS or _is_readable(connection.fileno()):
            connection.execute("SELECT 1")
    except psycopg.Error as error:
        raise InvalidatePoolError from error


def _is_readable(descriptor: int) -> bool:
    """Whether the server said something that nobody asked for: usually that this was the end."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
