"""Why an attempt was lost: a code, words for the job's owner, and whether it counts against the job."""

from dataclasses import dataclass

from service.errors import NoSpace, ServiceError, TimedOut, Unavailable
from service.storage import ObjectDamaged, ObjectMissing
from worker import io_faults
from worker.child import HostDied
from worker.device_faults import DeviceFault

# Not the job's doing, and not to be held against it: it waits for as long as it takes.
_OUTAGES = ("storage_unavailable", "io_error", "disk_full", "device_fault")


class Interrupted(Exception):
    """The host could not go on, and the job is not to blame."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


@dataclass(frozen=True, slots=True)
class Reason:
    """One that is not `counted` may come again and again; of the others, three without progress fail the job."""

    code: str
    message: str
    counted: bool


def of(error: Exception, fault: DeviceFault | None, out_of_memory: bool) -> Reason:
    """`fault` is what the GPU reported meanwhile; `out_of_memory` that the kernel has ended a process for it."""
    if fault is not None and isinstance(error, HostDied | Interrupted):
        # What a program may have done wrong by itself counts: it would do so again.
        return Reason("device_fault", f"the GPU reported {fault}", counted=fault.remedy == "restart")
    code, message = _told(error, out_of_memory)
    return Reason(code, message, counted=code not in _OUTAGES)


def _told(error: Exception, out_of_memory: bool) -> tuple[str, str]:
    match error:
        case HostDied(code=-9) if out_of_memory:
            return "out_of_memory", (
                "the kernel ended the process that computes because memory ran out; "
                "lower sequence_length or the rank, use nf4, or give the worker more memory"
            )
        case HostDied():
            return "process_died", _how_it_died(error.code)
        case Interrupted():
            return error.code, error.message
        case ObjectMissing() | ObjectDamaged():
            return "storage_damaged", f"a stored object is missing or damaged: {error}"
        case NoSpace():
            return "disk_full", error.message
        case Unavailable() | TimedOut():
            return "storage_unavailable", error.message
        case ServiceError():
            return error.code, error.message
        case OSError():
            return io_faults.told(error)
        case _:
            return "internal_error", f"an unforeseen fault in the worker: {type(error).__name__}"


def _how_it_died(code: int) -> str:
    if code == -9:
        return "the process that computes was killed"
    return f"the process that computes ended unexpectedly ({f'signal {-code}' if code < 0 else f'exit status {code}'})"
