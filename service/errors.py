"""What the application refuses, and how that is told over HTTP.

ServiceError            status, code, category
├── Invalid             422  a field or a row is impossible (param names it)
├── Malformed           400  the request itself cannot be read
├── Unauthorized        401  no key, or none that counts
├── Forbidden           403  the key is good, but not for this
├── NotFound            404  no such object, or another owner's: the two look the same
├── TimedOut            408  the request's body does not arrive
├── Conflict            409  the object is not in a state that allows this
├── TooLarge            413  more bytes than the limit
├── UnsupportedMedia    415  not a format that is read here
├── HeadersTooLarge     431  more than any request needs before its body
├── TooMany             429  more at once than one user may have
├── NoSpace             507  the disk or the object store is full
└── Unavailable         503  a part this depends on does not answer; try again
"""

from typing import Literal

Category = Literal["user", "platform", "capacity"]


class ServiceError(Exception):
    """Base of the tree. Rendered once per face, always in the one error shape."""

    status: int = 500
    code: str = "internal_error"
    category: Category = "platform"
    retry_after: int | None = None  # seconds, where trying again can help

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after = retry_after or type(self).retry_after


class Invalid(ServiceError):
    status, code, category = 422, "invalid_value", "user"


class Malformed(ServiceError):
    status, code, category = 400, "malformed_request", "user"


class Unauthorized(ServiceError):
    status, code, category = 401, "invalid_api_key", "user"


class Forbidden(ServiceError):
    status, code, category = 403, "forbidden", "user"


class NotFound(ServiceError):
    status, code, category = 404, "not_found", "user"


class TimedOut(ServiceError):
    status, code, category = 408, "request_timeout", "user"


class Conflict(ServiceError):
    status, code, category = 409, "conflict", "user"


class TooLarge(ServiceError):
    status, code, category = 413, "too_large", "user"


class UnsupportedMedia(ServiceError):
    status, code, category = 415, "unsupported_media_type", "user"


class HeadersTooLarge(ServiceError):
    status, code, category = 431, "headers_too_large", "user"


class TooMany(ServiceError):
    status, code, category, retry_after = 429, "too_many", "capacity", 5


class NoSpace(ServiceError):
    status, code, category = 507, "disk_full", "capacity"


class Unavailable(ServiceError):
    status, code, category, retry_after = 503, "unavailable", "platform", 2
