"""What routes are given: the parts of this process, who asks, and the body."""

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, TypeVar

import anyio
from celery import Celery
from fastapi import Depends, Header, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import TypeAdapter

from lora_engine import strict_json
from lora_engine.config import from_mapping
from service import jobs
from service.api.event_watch import Watch
from service.api.gate import Gate
from service.db import Database, caller
from service.errors import Invalid, Malformed, TimedOut, TooLarge, TooMany, UnsupportedMedia
from service.settings import Settings
from service.storage import Storage
from service.users import Principal

T = TypeVar("T")
SILENCE_SECONDS = 30.0  # a client that sends nothing for so long is gone
MIN_BYTES_PER_SECOND = 1024  # …or holds the connection for its own sake


@dataclass(frozen=True)
class Parts:
    """What a process that serves HTTP is made of."""

    settings: Settings
    database: Database
    storage: Storage
    celery: Celery
    streams: Counter[str] = field(default_factory=Counter)  # open event streams by owner

    @cached_property
    def watch(self) -> Watch:
        return Watch(self.database.of_everybody())  # a stream is opened by who may see the job

    @cached_property
    def gate(self) -> Gate:
        return Gate(self.settings, self.database)


async def _parts(request: Request) -> Parts:
    parts: Parts = request.app.state.parts
    return parts


Inside = Annotated[Parts, Depends(_parts)]

_bearer = HTTPBearer(auto_error=False, description="A key made by `luthier keys add` or `POST /keys`.")
_LOOKS = ("GET", "HEAD")


async def _caller(
    request: Request, parts: Inside, bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
) -> Principal:
    """Looking needs a key of the scope "read", all else "write". From here on the database shows the caller's rows."""
    address, key = request.client.host if request.client else "", bearer.credentials if bearer else None
    request.state.caller = None
    try:
        request.state.caller = principal = await anyio.to_thread.run_sync(parts.gate.enter, key, address)
        parts.gate.count(principal)
    except TooMany:
        # Such refusals come by the thousand: those that nobody answers for, or that only look, are told once a minute.
        of_many = request.state.caller is None or request.method in _LOOKS
        request.state.unrecorded = of_many and not parts.gate.is_recorded(address)
        raise
    principal.require("read" if request.method in _LOOKS else "write")
    caller.set(principal.user_id)
    return principal


Caller = Annotated[Principal, Depends(_caller)]


async def _everybody(principal: Caller, parts: Inside) -> Database:
    principal.require("admin")
    return parts.database.of_everybody()


# What operators' routes take in the place of `Inside`: who has no key for them gets no hold of other people's rows.
Everybody = Annotated[Database, Depends(_everybody)]

After = Annotated[
    str | None, Query(pattern=r"^[A-Za-z0-9._-]{1,100}$", description="the id before which the page begins")
]
Limit = Annotated[int, Query(ge=1, le=100, description="how many at most")]


async def chunks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises:
        TooLarge: at once when the length says so, or else as soon as `limit` is passed.
        TimedOut: it does not arrive, or hardly.
        Invalid: after its end, when it is not what `Content-Digest` says (RFC 9530).
        ClientDisconnect: the client went away before the end.
    """
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise TooLarge(f"the body is larger than {limit} bytes")
    stream, received, began = request.stream(), 0, anyio.current_time()
    expected, digest = _content_sha256(request), hashlib.sha256()
    while True:
        with anyio.move_on_after(SILENCE_SECONDS) as silence:
            chunk = await anext(stream, None)
        if silence.cancelled_caught:
            raise TimedOut(f"no byte of the body came for {SILENCE_SECONDS:.0f} s")
        if chunk is None:
            if expected is not None and digest.digest() != expected:
                message = "Content-Digest: the body that arrived has another SHA-256; send it again"
                raise Invalid(message, param="Content-Digest", code="checksum_mismatch")
            return
        received += len(chunk)
        if received > limit:
            raise TooLarge(f"the body is larger than {limit} bytes")
        elapsed = anyio.current_time() - began
        if elapsed > SILENCE_SECONDS and received < elapsed * MIN_BYTES_PER_SECOND:
            raise TimedOut(f"the body comes slower than {MIN_BYTES_PER_SECOND} bytes a second")
        if expected is not None:
            digest.update(chunk)
        if chunk:
            yield chunk


def _content_sha256(request: Request) -> bytes | None:
    """What `Content-Digest: sha-256=:…:` says of the body; other algorithms are not looked at. Raises Malformed."""
    given = re.search(r"(?:^|,)\s*sha-256=([^,]*)", request.headers.get("content-digest", ""))
    if given is None:
        return None
    value = re.fullmatch(r":([A-Za-z0-9+/]{43}=):\s*", given[1])
    if value is None:
        raise Malformed("Content-Digest: write sha-256=:…: with the digest in base64", param="Content-Digest")
    return base64.b64decode(value[1])


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True)
class Body:
    """A decoded JSON object and the SHA-256 of its canonical form."""

    values: Any
    sha256: str


async def _read_json(request: Request) -> Body:
    if media_type(request) != "application/json":
        raise UnsupportedMedia("the body must be JSON: send it with 'Content-Type: application/json'")
    data = b"".join([chunk async for chunk in chunks(request, request.app.state.parts.settings.max_body_bytes)])
    if not data.strip():
        raise Invalid("the body is empty; a JSON object is expected")
    try:
        values = strict_json.loads(data)
    except strict_json.UnusableValue as error:
        raise Invalid(f"the body: {error}", code="invalid_json") from None
    except strict_json.StrictJSONError as error:
        raise Malformed(f"the body is not valid JSON: {error}", code="invalid_json") from None
    canonical = json.dumps(
        [request.url.path, _ordered(values)], sort_keys=True, ensure_ascii=False, separators=(",", ":")
    )
    return Body(values, hashlib.sha256(canonical.encode()).hexdigest())


def _ordered(values: Any) -> Any:
    """Patterns as lists of pairs: of several that fit, the last one counts, so that their order is part of the body."""
    if isinstance(values, list):
        return [_ordered(item) for item in values]
    if not isinstance(values, dict):
        return values
    pairs = {name: list(item.items()) for name, item in values.items() if _is_pattern(name) and isinstance(item, dict)}
    return {name: pairs.get(name) or _ordered(item) for name, item in values.items()}


def _is_pattern(name: str) -> bool:
    return name == "weights" or name.endswith("_pattern")


JsonBody = Annotated[Body, Depends(_read_json)]


async def _no_body(request: Request) -> Body:
    return Body({}, hashlib.sha256(request.url.path.encode()).hexdigest())


PathBody = Annotated[Body, Depends(_no_body)]  # of a route that reads none: its path says everything


def parse(cls: type[T], body: Body) -> T:
    """Raises SpecError, which names the field."""
    return from_mapping(cls, body.values)


def body_schema(cls: type[Any], example: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI `requestBody` of a spec, from the same dataclass that reads it."""
    schema = TypeAdapter(cls).json_schema()
    definitions = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            rest = {key: item for key, item in value.items() if key != "$ref"}
            return inline(definitions[value["$ref"].rsplit("/", 1)[-1]]) | rest
        # An object is closed, unless it says what its other properties are.
        closed = {"additionalProperties": False} if value.get("type") == "object" else {}
        return closed | {key: inline(item) for key, item in value.items()}

    content = {"application/json": {"schema": inline(schema), "example": example}}
    return {"requestBody": {"required": True, "content": content}}


def idempotency(body: Body, key: str | None) -> jobs.Idempotency | None:
    """Raises Malformed for a key that is too long or cannot be printed."""
    if key is None:
        return None
    if not re.fullmatch(r"[\x20-\x7e]{1,255}", key):
        raise Malformed("Idempotency-Key: 1 to 255 printable ASCII characters", param="Idempotency-Key")
    return jobs.Idempotency(key=key, body_sha256=body.sha256)


IdempotencyHeader = Annotated[
    str | None,
    Header(alias="Idempotency-Key", description="the same key and body again answer with the same job"),
]
