"""Requests that schemathesis makes of our OpenAPI document: none is answered by a fault of ours.

FUZZ_EXAMPLES says how many for each operation; `make fuzz` asks for many.
"""

import os
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.service.site import Site

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "4"))


def test_no_request_is_answered_by_a_fault(shared_site: Site) -> None:
    document: dict[str, Any] = shared_site.app.openapi()
    schema = schemathesis.openapi.from_dict(document)
    seen = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def attempt(case: Any) -> None:
            nonlocal seen
            seen += 1
            sent = case.as_transport_kwargs(base_url="http://testserver")
            answer = shared_site.ann.request(
                sent["method"], sent["url"], params=sent.get("params"), json=sent.get("json"),
                content=sent.get("data") if isinstance(sent.get("data"), (bytes, str)) else None,
            )  # fmt: skip
            assert answer.status_code < 500, (sent, answer.text)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code", "category"}

        attempt()
    assert seen >= len(document["paths"])
