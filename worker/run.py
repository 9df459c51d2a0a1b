"""One attempt at one job: claim → workspace → order → news → publish. The only place that moves a job."""

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from lora_engine import failpoints
from lora_engine.base_files import digest_of
from service import leases
from service import storage as objects
from service.db import Database
from service.errors import ServiceError
from service.leases import Claim, Fenced, Result
from service.models import Checkpoint, JobEvent
from service.settings import Settings
from service.storage import ObjectMissing, Storage
from worker import memory, orders, reasons, workspace
from worker.channel import News
from worker.child import Host
from worker.device_faults import DeviceFaults
from worker.progress import Reporter
from worker.reasons import Interrupted, Reason
from worker.watchdog import Watchdog

log = logging.getLogger(__name__)
_KEPT_CHECKPOINTS = 2  # the older one is for the day on which the newer one's bytes do not verify
_RETRY_SECONDS = 1.0
_FULL_DISKS = 5  # that an attempt may end at without a newer checkpoint: no disk may ever be large enough
_DUMP_SECONDS = 1.0  # for a host that hangs to say where
_LOOK_SECONDS = 0.2  # how soon a cancel, a drain or a fence is noticed between two messages of the host


@dataclass(frozen=True)
class Attempt:
    """What an attempt works with; `drain` is set when the worker shall stop, `faults` are those of its device."""

    claim: Claim
    settings: Settings
    database: Database
    storage: Storage
    host: Host
    drain: threading.Event
    faults: DeviceFaults = field(default_factory=lambda: DeviceFaults(None))
    oom_kills: int = field(default_factory=memory.oom_kills)  # as it began


def run_job(attempt: Attempt) -> bool:
    """Bring the attempt to an end, whatever happens. The host is dead afterwards unless it ended its order.

    Returns whether this worker did its part: False when its process, its disk or what it depends on failed.
    """
    claim = attempt.claim
    in_order = True
    try:
        with Reporter(attempt.database, claim, attempt.settings) as reporter:
            try:
                with workspace.workspace(attempt.settings.work_dir, claim) as folder:
                    _work(attempt, reporter, folder)
            except Fenced:
                _discard(attempt)
            except SQLAlchemyError:
                raise
            except Exception as error:  # sorted into reasons, logged, and counted against endless repetition
                in_order = False
                _lose(attempt, reporter, error)
    except SQLAlchemyError:
        # The lease will run out and the reaper will queue the job again.
        log.exception("%s: the database did not take the end of this attempt", claim.job_id)
        _kill(attempt)
        return False
    return in_order


def _lose(attempt: Attempt, reporter: Reporter, error: Exception) -> None:
    """The attempt ended through no fault of the job: it goes back to the queue, counted."""
    _kill(attempt)
    why = reasons.of(error, attempt.faults.worst(), memory.oom_kills() > attempt.oom_kills)
    log.warning("%s: attempt lost: %s", attempt.claim.job_id, why.message, exc_info=error)

    def retry(session: Session) -> None:
        if why.code == "disk_full" and not isinstance(error, ServiceError) and _too_often(session, attempt.claim, why):
            text = f"gave up after {_FULL_DISKS} attempts without a newer checkpoint; the last one: {why.message}"
            leases.fail(session, attempt.claim, why.code, "capacity", text)
        else:
            leases.retry(session, attempt.claim, why.code, why.message, counted=why.counted)

    try:
        _commit(attempt, reporter, retry)
    except Fenced:
        _discard(attempt)


def _too_often(session: Session, claim: Claim, why: Reason) -> bool:
    """Whether it is time to give up what goes back without being counted: by the events since the last checkpoint."""
    recorded = select(func.coalesce(func.max(Checkpoint.epoch), 0)).where(Checkpoint.job_id == claim.job_id)
    lost = select(func.count()).where(
        JobEvent.job_id == claim.job_id,
        JobEvent.epoch > recorded.scalar_subquery(),
        JobEvent.level == "warn",
        JobEvent.message.endswith(why.message, autoescape=True),
    )
    return (session.scalar(lost) or 0) + 1 >= _FULL_DISKS


def _discard(attempt: Attempt) -> None:
    """The row has moved on. If that was a cancel, whoever still owns the epoch finishes it."""
    _kill(attempt)
    try:
        with attempt.database.unit_of_work() as session:
            leases.cancelled(session, attempt.claim)
    except Fenced:
        log.warning("%s: epoch %d was fenced; its work is discarded", attempt.claim.job_id, attempt.claim.epoch)


def _commit(attempt: Attempt, reporter: Reporter, change: Callable[[Session], None]) -> None:
    """Make a change of this attempt, however often the database has to be asked: the work it tells of is done.

    Raises:
        Fenced: the job is no longer this attempt's.
        SQLAlchemyError: the database has not answered for too long.
    """
    while True:
        try:
            with attempt.database.unit_of_work() as session:
                change(session)
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            if reporter.cut_off:
                raise
            log.warning("%s: the database does not answer: %s", attempt.claim.job_id, type(error).__name__)
            time.sleep(_RETRY_SECONDS)
        else:
            return


def _work(attempt: Attempt, reporter: Reporter, folder: Path) -> None:
    reporter.tell(phase="fetching files")
    _commit(attempt, reporter, lambda session: leases.start(session, attempt.claim))
    verb, order = orders.prepare(attempt.database, attempt.storage, attempt.claim, folder)
    attempt.host.order(verb, **order)
    failpoints.reach("worker.ordered")
    listener = _Listener(attempt, reporter)
    while not listener.ended:
        news = attempt.host.next_news(_LOOK_SECONDS)
        if news is not None:
            listener.hear(news)
        listener.look_around()


class _Listener:
    """What the worker does about the host's news, and about what happens around it meanwhile."""

    def __init__(self, attempt: Attempt, reporter: Reporter) -> None:
        self._attempt, self._reporter = attempt, reporter
        self._kill_at: float | None = None
        self._cancelling = False
        self._seconds_per_step: float | None = None
        self._total_steps = 0
        self._began = time.monotonic()
        self._watchdog = Watchdog(attempt.settings.stall_seconds)
        self.ended = False

    def hear(self, news: News) -> None:
        """One message. Raises Fenced, Interrupted, and what storage and database raise."""
        match news.event:
            case "phase":
                self._reporter.tell(phase=news.data["phase"])
            case "planned":
                self._total_steps = news.data["total_steps"]
                self._reporter.tell(phase="training", step=news.data["step"], total_steps=self._total_steps)
            case "progress":
                self._progress(**news.data)
            case "evaluated":
                self._reporter.point(_point(news.data))
            case "step":
                self._step(news.data)
            case "checkpoint":
                self._checkpoint(news.data["step"], Path(news.data["folder"]))
            case "finished":
                self._publish(**news.data)
            case "warning":
                self._commit(lambda session: leases.warn(session, self._attempt.claim, news.data["message"]))
            case "stopped":
                self._stopped()
            case "failed":
                self._failed(news.data)
            case "interrupted":
                raise Interrupted(news.data["code"], news.data["message"])
            case _:
                log.debug("host: %s", news.event)
        self._watchdog.heard(news)

    def look_around(self) -> None:
        """Pass on a cancel or a drain; kill a host that does not follow in time.

        Raises:
            Fenced: the job is no longer this attempt's.
            Interrupted: the GPU is not to be used any more, or the host hangs.
        """
        attempt, reporter = self._attempt, self._reporter
        if self.ended:
            return
        if reporter.fenced:
            raise Fenced(attempt.claim.job_id)
        if (fault := attempt.faults.worst()) is not None and fault.remedy != "restart":
            raise Interrupted("device_fault", f"the GPU reported {fault}")
        if reporter.wish == "cancel" and not self._cancelling:
            self._cancelling = True
            attempt.host.stop("abandon")
            self._kill_at = time.monotonic() + attempt.settings.cancel_grace_seconds
        elif (attempt.drain.is_set() or reporter.cut_off or reporter.wish == "drain") and self._kill_at is None:
            attempt.host.stop("checkpoint")
            self._kill_at = time.monotonic() + attempt.settings.drain_grace_seconds
        elif self._kill_at is not None and time.monotonic() > self._kill_at:
            _kill(attempt)
            self._stopped()
        elif self._kill_at is None and self._watchdog.expired:
            self._give_up_on_host()

    def _give_up_on_host(self) -> None:
        silence = self._watchdog.silence
        log.error("%s: the host has told nothing for %.0f s; where it is:", self._attempt.claim.job_id, silence)
        self._attempt.host.dump_stacks()
        time.sleep(_DUMP_SECONDS)
        raise Interrupted("stalled", f"the process that computes made no progress for {silence:.0f} seconds")

    def _progress(self, step: int, total_steps: int) -> None:
        """Of work that counts modules or bytes: the rest takes as long as what was done did."""
        left = (time.monotonic() - self._began) * (total_steps - step) / step if step else None
        self._reporter.tell(step=step, total_steps=total_steps, eta_seconds=left and round(left, 1))

    def _step(self, step: dict[str, Any]) -> None:
        seconds = float(step["seconds"])
        known = self._seconds_per_step
        self._seconds_per_step = seconds if known is None else 0.9 * known + 0.1 * seconds
        left = max(0, self._total_steps - step["step"]) * self._seconds_per_step
        self._reporter.tell(step=step["step"], eta_seconds=round(left, 1))
        self._reporter.point(_point(step))

    def _checkpoint(self, step: int, folder: Path) -> None:
        attempt = self._attempt
        try:
            prefix, manifest = workspace.put_checkpoint(attempt.storage, attempt.claim, step, folder)
        except (FileNotFoundError, ObjectMissing):
            if folder.exists():
                raise
            log.info("%s: the checkpoint at step %d was superseded before it was stored", attempt.claim.job_id, step)
            return
        superseded: list[str] = []

        def record(session: Session) -> None:
            leases.add_checkpoint(session, attempt.claim, step, prefix, manifest)
            superseded[:] = leases.forget_checkpoints(session, attempt.claim, _KEPT_CHECKPOINTS)

        failpoints.reach("worker.checkpoint_uploaded")
        self._commit(record)
        failpoints.reach("worker.checkpoint_recorded")
        for old in superseded:
            try:
                attempt.storage.delete_prefix(old)
            except (ServiceError, OSError) as error:  # the sweep removes it when the job has ended
                log.warning("%s: could not remove %s: %s", attempt.claim.job_id, old, error)

    def _publish(self, **made: Any) -> None:
        claim, result = self._attempt.claim, self._upload(**made)
        failpoints.reach("worker.before_publish")
        self._commit(lambda session: leases.succeed(session, claim, result))
        failpoints.reach("worker.after_publish")
        self.ended = True

    def _upload(
        self, folder: str, metrics: dict[str, Any], rank: int | None = None, digest: str | None = None
    ) -> Result:
        """An adapter has a rank and the engine's digest; an artifact that of its files."""
        attempt = self._attempt
        self._reporter.tell(phase="publishing")
        prefix = leases.result_prefix(attempt.claim, "artifact" if rank is None else "adapter")
        files = objects.put_folder(attempt.storage, prefix, Path(folder))
        return Result(
            prefix=prefix, files=files, digest=digest or digest_of(files), rank=rank, metrics=_finite(metrics)
        )  # fmt: skip

    def _stopped(self) -> None:
        end = leases.cancelled if self._cancelling else leases.release
        self._commit(lambda session: end(session, self._attempt.claim))
        self.ended = True

    def _failed(self, reason: dict[str, Any]) -> None:
        claim = self._attempt.claim
        why = (reason["code"], reason["category"], reason["message"])
        left = self._upload(**reason["adapter"]) if "adapter" in reason else None
        self._commit(lambda session: leases.fail(session, claim, *why, left))
        self.ended = True

    def _commit(self, change: Callable[[Session], None]) -> None:
        """`change`, after everything that was told before it."""
        with suppress(OperationalError, InterfaceError, PoolTimeout):  # `change` waits for the database, then
            self._reporter.flush()
        _commit(self._attempt, self._reporter, change)


def _point(told: dict[str, Any]) -> dict[str, Any]:
    """What a point of the metrics keeps of what the host tells: what there is to say."""
    left_out = {"checkpoint_due"} if told.get("skipped") else {"checkpoint_due", "skipped"}
    return {name: value for name, value in _finite(told).items() if value is not None and name not in left_out}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Null in the place of numbers that JSON, and so the database, does not have."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return _finite(value)
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: finite(value) for name, value in values.items()}


def _kill(attempt: Attempt) -> None:
    if attempt.host.alive:
        attempt.host.kill()
