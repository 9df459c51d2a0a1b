"""Which errors of files and connections pass by themselves, and which would come again at every attempt."""

import errno
import re

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PASSING = (
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
)  # fmt: skip


def told(error: Exception) -> tuple[str, str]:
    """(code, words): "disk_full" and "io_error" are outages, "file_unusable" may be the doing of the job itself.

    A file that is missing or may not be read, or whose bytes make no sense, is so at the next attempt too.
    """
    number = getattr(error, "errno", None) or _number_in(str(error))
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if number in FULL:
        return "disk_full", "the worker's disk is full"
    if number in _PASSING or isinstance(error, TimeoutError | ConnectionError):
        return "io_error", f"the worker's disk or network failed: {words}"
    return "file_unusable", f"the worker cannot use a file: {words}"


def _number_in(words: str) -> int | None:
    """As safetensors, written in Rust, tells of what the operating system refused it."""
    found = re.search(r"\(os error (\d+)\)", words)
    return int(found[1]) if found else None
