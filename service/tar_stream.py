"""A tar without compression, read as it arrives, of which only files are taken whose names are known.

Python's own reader wants to seek, trusts sizes, and was bypassed before where it writes files; this one writes none.
"""

import re
import tarfile
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath

from service.errors import Invalid, UnsupportedMedia

_BLOCK = 512
_MAX_MEMBERS = 1000
_MAX_EXTENSION_BYTES = 64 << 10  # of a tar's own notes: long names, times
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


class TarStream:
    """Feed it with `write`, then call `finish`. `take` has what gets the content of each file, by its last name."""

    def __init__(self, take: Mapping[str, Callable[[bytes], None]]) -> None:
        self._take = take
        self._block = bytearray()
        self._name = ""
        self._note = bytearray()  # a long name of the next member, as GNU or PAX write it
        self._noting = b""
        self._seen: set[str] = set()
        self._left = 0  # of the present member's content
        self._padding = 0
        self._members = 0
        self._zeros = 0  # blocks: two end the archive, and what follows is not looked at

    def write(self, data: bytes) -> None:
        """The next bytes, in pieces of any size.

        Raises:
            UnsupportedMedia: no tar, or one with pickles.
            Invalid: links, devices, paths that lead out, a known file twice, more than anybody needs.
            ServiceError: what a taker raises.
        """
        view = memoryview(data)
        while view and self._zeros < 2:
            if self._left:
                taken = min(self._left, len(view))
                self._left -= taken
                if self._noting:
                    self._note += view[:taken]
                elif self._name in self._take:
                    self._take[self._name](bytes(view[:taken]))
            elif self._padding:
                taken = min(self._padding, len(view))
                self._padding -= taken
            else:
                taken = min(_BLOCK - len(self._block), len(view))
                self._block += view[:taken]
                if len(self._block) == _BLOCK:
                    self._begin(bytes(self._block))
                    self._block.clear()
            view = view[taken:]

    def finish(self) -> None:
        """Raises Invalid when the archive broke off."""
        if not self._zeros:
            raise Invalid("archive: ends in the middle; it is torn, or no tar", param="archive")

    def _begin(self, block: bytes) -> None:
        if not any(block):
            self._zeros += 1
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise UnsupportedMedia("archive: is no tar; send one without compression", param="archive") from None
        self._members += 1
        if self._members > _MAX_MEMBERS or info.size < 0:
            raise Invalid(f"archive: has more than {_MAX_MEMBERS} members, or a broken one", param="archive")
        if info.type in _EXTENSIONS and info.size > _MAX_EXTENSION_BYTES:
            raise Invalid("archive: has a header that is too long", param="archive")
        self._name, self._noting = "", b""
        if info.type in _EXTENSIONS:
            self._noting, self._note = info.type, bytearray()
        else:
            info.name = _long_name(bytes(self._note)) or info.name
            self._note.clear()
            self._name = "" if info.isdir() else _last_name(info)
        if self._name in self._seen & set(self._take):
            raise Invalid(f"archive: has {self._name} twice", param="archive")
        self._seen.add(self._name)
        self._left = 0 if info.isdir() else info.size
        self._padding = -self._left % _BLOCK


def _long_name(note: bytes) -> str:
    """What GNU's long name (text, ended by NUL) or PAX's `path` ("30 path=…\n") says; "" for other notes."""
    path = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", note)
    name = path[1] if path else b"" if re.match(rb"\d+ [A-Za-z.]+=", note) else note.rstrip(b"\0")
    return name.decode("utf-8", "surrogateescape")


def _last_name(info: tarfile.TarInfo) -> str:
    shown, parts = ascii(info.name)[:80], PurePosixPath(info.name).parts
    if info.type not in _REGULAR:
        raise Invalid(f"archive: {shown} is no plain file", param="archive")
    if not parts or info.name.startswith("/") or ".." in parts or "\\" in info.name:
        raise Invalid(f"archive: {shown} leads out of the folder", param="archive")
    if parts[-1].endswith(_PICKLES):
        message = f"archive: {shown} is a pickle, which is never read; convert it to safetensors"
        raise UnsupportedMedia(message, param="archive")
    return parts[-1]
