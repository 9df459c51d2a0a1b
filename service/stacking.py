"""A small stack made by the process that was asked for it: torch-free, and a worker's job again if that fails."""

import errno
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lora_engine import failpoints
from lora_engine.adapter_header import digest
from lora_engine.errors import EngineError
from lora_engine.merging.config import MergeConfig
from service import adapters, jobs, leases, scratch, sources
from service import storage as objects
from service.db import Database
from service.errors import NoSpace
from service.leases import Claim, Fenced, Result
from service.models import Adapter
from service.settings import Settings
from service.sources import Source
from service.storage import Storage

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stack:
    """What is asked for: `found` are the adapters of `sources`, in their order."""

    config: MergeConfig
    sources: Sequence[Source]
    found: Sequence[Adapter]


def make(database: Database, storage: Storage, settings: Settings, claim: Claim, asked: Stack) -> None:
    """Carry out a merge that this process has taken; it has ended afterwards, or is queued for the workers.

    Raises:
        EngineError: the adapters cannot be merged; the job has failed.
        NoSpace, OSError: there is no room; the job has failed, and nothing of it is left.
    """
    try:
        with scratch.folder(settings) as folder:
            result = _stack(storage, claim, asked, folder)
        failpoints.reach("stack.before_publish")
        with database.unit_of_work() as session:
            leases.succeed(session, claim, result)
        failpoints.reach("stack.after_publish")
    except Fenced:
        log.warning("%s: cancelled, or slower than its lease", claim.job_id)
        with suppress(Fenced), database.unit_of_work() as session:
            leases.cancelled(session, claim)
    except EngineError as error:
        _give_up(database, claim, error.code, error.category, error.message)
        raise
    except Exception as error:
        if isinstance(error, NoSpace) or (isinstance(error, OSError) and error.errno in _FULL):
            _give_up(database, claim, NoSpace.code, NoSpace.category, "there is no space left for the result")
            raise
        log.exception("%s: left to the workers", claim.job_id)
        with suppress(Fenced), database.unit_of_work() as session:  # cancelled meanwhile: nothing is left to do
            leases.hand_over(session, claim)


def _stack(storage: Storage, claim: Claim, asked: Stack, folder: Path) -> Result:
    # numpy is imported when the first one is made. On matrices as small as these its threads wait for each other
    # longer than they compute: thirty times as long on a busy machine.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from lora_engine.merging import result, stack

    for adapter in sources.distinct(asked.found):
        adapters.fetch(storage, adapter, folder / adapter.id)
    plan = sources.planned(asked.config, asked.sources, asked.found, folder)
    modules = stack.stack(plan, lambda _done, _total: None)
    output = folder / "result"
    metrics = result.publish(plan, modules, output, lineage={}, files={})
    prefix = leases.result_prefix(claim, "adapter")
    files = objects.put_folder(storage, prefix, output)
    return Result(prefix=prefix, files=files, digest=digest(output), rank=metrics["rank"], metrics=metrics)


def _give_up(database: Database, claim: Claim, code: str, category: str, message: str) -> None:
    """The request is answered with the reason; the same one with the same key may be tried again."""
    with suppress(Fenced), database.unit_of_work() as session:  # cancelled meanwhile: it has its end
        leases.fail(session, claim, code, category, message)
        jobs.forget_key(session, claim.job_id)
