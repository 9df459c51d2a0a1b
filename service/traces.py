"""Traces by OpenTelemetry, where `LUTHIER_OTLP_ENDPOINT` names a collector: request → job → every attempt at it.

A job's row keeps the context of the request that submitted it (W3C's traceparent), so that attempts in other processes,
hours later, belong to the same trace. Attributes are routes, statuses, ids and kinds; nothing of users' data.
Without a collector nothing of OpenTelemetry is imported, and a span costs a check for None.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from service.settings import Settings

_TRACE_PARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_tracing: Any = None


class Span:
    """What may be added to a span while it lasts."""

    def __init__(self, inner: Any = None) -> None:
        self._inner = inner

    def name(self, name: str, attributes: Mapping[str, str | int]) -> None:
        if self._inner is not None:
            self._inner.update_name(name)
            self._inner.set_attributes(attributes)

    def fault(self) -> None:
        if self._inner is not None:
            self._inner.set_status(_tracing.error)


def configure(settings: Settings, process: str) -> None:
    """Send the spans of this process, if the operator wants them.

    Raises:
        RuntimeError: the extra `traces` is not installed.
    """
    global _tracing
    if not settings.otlp_endpoint:
        return
    try:
        _tracing = _Tracing(settings.otlp_endpoint, f"luthier-{process}")
    except ImportError as error:
        raise RuntimeError("LUTHIER_OTLP_ENDPOINT needs OpenTelemetry: pip install 'luthier[traces]'") from error


def shut_down() -> None:
    """Send what is left."""
    global _tracing
    tracing, _tracing = _tracing, None
    if tracing is not None:
        tracing.provider.shutdown()


@contextmanager
def span(name: str, parent: str | None = None, attributes: Mapping[str, str] | None = None) -> Iterator[Span]:
    """A span around the block: a child of the present one, or of `parent`, a traceparent from elsewhere."""
    if _tracing is None:
        yield Span()
        return
    known = parent if parent is not None and _TRACE_PARENT.fullmatch(parent) else None
    context = None if known is None else _tracing.propagator.extract({"traceparent": known})
    # What an exception says can hold data; that there was one is enough.
    options = {"attributes": attributes, "record_exception": False, "set_status_on_exception": False}
    with _tracing.tracer.start_as_current_span(name, context=context, **options) as inner:
        told = Span(inner)
        try:
            yield told
        except BaseException:
            told.fault()
            raise


def current() -> str | None:
    """The traceparent of the present span, to be kept for other processes."""
    if _tracing is None:
        return None
    carrier: dict[str, str] = {}
    _tracing.propagator.inject(carrier)
    return carrier.get("traceparent")


class _Tracing:
    def __init__(self, endpoint: str, service: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}))
        exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self.provider.get_tracer("luthier")
        self.propagator = TraceContextTextMapPropagator()
        self.error = StatusCode.ERROR
