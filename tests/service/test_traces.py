"""Traces: request, job and attempt are one trace, told to a collector in OpenTelemetry's protocol."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from service import leases, traces
from service.models import Job
from service.settings import Settings
from tests.service import rows
from tests.service.site import Site, open_site


@contextmanager
def collecting() -> Iterator[tuple[str, list[Span]]]:
    spans: list[Span] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                data = gzip.decompress(data)
            told = ExportTraceServiceRequest.FromString(data)
            spans.extend(span for one in told.resource_spans for scope in one.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    server.server_close()


@pytest.fixture
def traced(settings: Settings) -> Iterator[tuple[Site, list[Span]]]:
    with collecting() as (endpoint, spans), open_site(settings) as site:
        traces.configure(settings.model_copy(update={"otlp_endpoint": endpoint}), "api")
        yield site, spans
        traces.shut_down()


def test_a_request_its_job_and_the_attempt_are_one_trace(traced: tuple[Site, list[Span]]) -> None:
    site, spans = traced
    dataset = rows.add_dataset(site.database, site.ids["ann"])
    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    asked = {"base_model": rows.BASE_MODEL, "dataset": dataset, "name": "canary in a name"}
    job_id = site.ann.post("/jobs", json=asked, headers={"traceparent": given}).json()["id"]
    with site.database.unit_of_work() as session:
        claim = leases.claim(session, "worker", "slot", 60)
    assert claim is not None
    with pytest.raises(ZeroDivisionError), traces.span("attempt", claim.trace_parent, {"luthier.job": job_id}):
        raise ZeroDivisionError("canary in an error")
    traces.shut_down()
    by_name = {span.name: span for span in spans}
    request, attempt = by_name["POST /jobs"], by_name["attempt"]
    assert request.trace_id.hex() == attempt.trace_id.hex() == given.split("-")[1]
    assert request.parent_span_id.hex() == given.split("-")[2]
    assert attempt.parent_span_id == request.span_id
    assert attempt.status.code == 2
    assert "canary" not in str(spans)


def test_without_a_collector_nothing_is_traced_and_no_row_has_a_context(settings: Settings) -> None:
    with open_site(settings) as site:
        dataset = rows.add_dataset(site.database, site.ids["ann"])
        job_id = site.ann.post("/jobs", json={"base_model": rows.BASE_MODEL, "dataset": dataset}).json()["id"]
        with site.database.reading() as session:
            assert session.get_one(Job, job_id).trace_parent is None
    assert traces.current() is None


def test_a_collector_without_the_extra_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(RuntimeError, match=r"luthier\[traces\]"):
        traces.configure(Settings(data_dir=tmp_path, otlp_endpoint="http://127.0.0.1:1"), "api")


@pytest.mark.parametrize("given", ["00-" + "0" * 32 + "-b7ad6b7169203331-01", "x", "00-zz", "a" * 55])
def test_a_context_that_is_none_begins_a_trace_of_its_own(traced: tuple[Site, list[Span]], given: str) -> None:
    site, spans = traced
    assert site.ann.get("/jobs", headers={"traceparent": given}).status_code == 200
    traces.shut_down()
    (span,) = [span for span in spans if span.name == "GET /jobs"]
    assert span.parent_span_id == b""
