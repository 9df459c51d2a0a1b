"""Every refusal and every fault, rendered in the one error shape."""

import errno
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from lora_engine.errors import EngineError
from service import schemas
from service.errors import Invalid, NoSpace, ServiceError, Unavailable
from service.storage import ObjectDamaged, ObjectMissing

log = logging.getLogger(__name__)
_TYPES = {"user": "invalid_request_error", "platform": "server_error", "capacity": "capacity_error"}
_HTTP_CODES = {404: "no_such_path", 405: "method_not_allowed"}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says about a route's refusals."""
    reasons = {
        400: "The request cannot be read", 401: "No valid API key", 403: "The key does not allow it",
        404: "No such object, or another owner's", 408: "The body did not arrive",
        409: "Not in a state that allows this", 413: "Larger than the limit", 415: "Not a format that is read here",
        416: "No such range", 422: "A field or a row is impossible", 429: "Too many at once",
        503: "A part this depends on does not answer", 507: "The disk is full",
    }  # fmt: skip
    return {status: {"model": schemas.ErrorBody, "description": reasons[status]} for status in statuses}


def answer(error: ServiceError, **headers: str) -> JSONResponse:
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 408:
        headers["Connection"] = "close"
    return _shape(error.status, error.message, error.code, error.category, error.param, headers)


def install(app: FastAPI) -> None:
    """What raises inside is answered here; what is not listed is a fault of ours and ends at the edge."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(EngineError, _engine_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(OSError, _os_error)
    app.add_exception_handler(ObjectMissing, _object_missing)
    app.add_exception_handler(ObjectDamaged, _object_missing)
    # InternalError is what a primary says that has become a standby, and a transaction that stood still for too long.
    for kind in (OperationalError, InterfaceError, InternalError, PoolTimeout):
        app.add_exception_handler(kind, _database_error)


def _shape(
    status: int, message: str, code: str, category: str, param: str | None = None, headers: dict[str, str] | None = None
) -> JSONResponse:
    error = {"message": message, "type": _TYPES[category], "param": param, "code": code, "category": category}
    return JSONResponse({"error": error}, status, headers)


def _service_error(_: Request, error: Any) -> Response:
    return answer(error)


def _engine_error(_: Request, error: Any) -> Response:
    return answer(Invalid(error.message, param=error.facts.get("field"), code=error.code))


def _validation_error(_: Request, error: Any) -> Response:
    """Of path, query and headers; bodies are checked by the specs themselves."""
    first = error.errors()[0]
    param = str(first["loc"][-1])
    return answer(Invalid(f"{param}: {first['msg']}", param=param))


def _http_error(_: Request, error: Any) -> Response:
    code = _HTTP_CODES.get(error.status_code, "refused")
    return _shape(error.status_code, error.detail, code, "user", headers=dict(error.headers or {}))


def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


def _database_error(_: Request, error: Exception) -> Response:
    log.error("the database does not answer: %s", error)
    if "disk is full" in str(error) or getattr(getattr(error, "orig", None), "sqlstate", None) == "53100":
        return answer(NoSpace("there is no space left on the database's disk"))
    return answer(Unavailable("the database does not answer; try again", code="database_unavailable"))


def _os_error(_: Request, error: Any) -> Response:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise error
    log.error("no space: %s", error)
    return answer(NoSpace("there is no space left on the disk"))


def _object_missing(_: Request, error: Exception) -> Response:
    log.error("a row has no sound object: %r", error)
    return answer(Unavailable("the file is missing from the object store, or damaged", code="object_missing"))
