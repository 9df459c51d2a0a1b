"""Pages of things with ids."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from service import schemas


class _Identified(Protocol):
    id: str


T = TypeVar("T", bound=_Identified)


def page(kind: type[T], data: Sequence[T], more: bool) -> schemas.Page[T]:
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return schemas.Page[kind](data=list(data), has_more=more, first_id=first, last_id=last)  # type: ignore[valid-type]
