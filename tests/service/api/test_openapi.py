"""The documentation is complete: every operation, every answer, every body."""

from typing import Any

import pytest

from lora_engine.config import from_mapping
from service import schema_examples, schemas
from service.adapter_jobs import AnalyzeRequest, ExportRequest, ExtractRequest, SearchRequest
from service.app import create_app
from service.jobs import TrainingRequest
from service.merges import MergeRequest
from service.settings import Settings
from service.webhooks import WebhookRequest


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return create_app(Settings(data_dir=tmp_path_factory.mktemp("openapi"))).openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_route_is_there(document: dict[str, Any]) -> None:
    assert {name for name, _ in operations(document)} == {
        "GET /healthz", "GET /readyz",
        "GET /datasets", "POST /datasets", "GET /datasets/{dataset_id}", "DELETE /datasets/{dataset_id}",
        "GET /datasets/{dataset_id}/content",
        "GET /jobs", "POST /jobs", "GET /jobs/{job_id}", "POST /jobs/{job_id}/cancel", "POST /jobs/{job_id}/pause",
        "POST /jobs/{job_id}/resume", "GET /jobs/{job_id}/events",
        "GET /jobs/{job_id}/metrics", "GET /jobs/{job_id}/curves.svg",
        "GET /adapters", "POST /adapters", "POST /adapters/merge",
        "GET /adapters/{adapter_id}", "DELETE /adapters/{adapter_id}",
        "GET /adapters/{adapter_id}/files", "GET /adapters/{adapter_id}/files/{name}",
        "GET /adapters/{adapter_id}/archive", "GET /adapters/{adapter_id}/certificate",
        "GET /adapters/aliases", "PUT /adapters/aliases/{alias}", "DELETE /adapters/aliases/{alias}",
        "POST /adapters/search-weights", "POST /adapters/extract", "POST /adapters/analyze",
        "POST /adapters/{adapter_id}/export", "POST /adapters/{adapter_id}/verify",
        "GET /artifacts", "GET /artifacts/{artifact_id}", "DELETE /artifacts/{artifact_id}",
        "GET /artifacts/{artifact_id}/files", "GET /artifacts/{artifact_id}/files/{name}",
        "GET /artifacts/{artifact_id}/archive",
        "GET /base-models", "GET /base-models/{base_model_id}",
        "GET /keys", "POST /keys", "POST /keys/{key_id}/rotate", "DELETE /keys/{key_id}",
        "GET /users", "POST /users", "GET /users/{user_id}", "PUT /users/{user_id}/limits", "DELETE /users/{user_id}",
        "POST /datasets/{dataset_id}/erase", "GET /erasures", "GET /erasures/{erasure_id}", "GET /audit",
        "GET /webhooks", "POST /webhooks", "GET /webhooks/{webhook_id}", "PATCH /webhooks/{webhook_id}",
        "DELETE /webhooks/{webhook_id}", "GET /webhooks/{webhook_id}/deliveries",
        "GET /webhooks/{webhook_id}/deliveries/{delivery_id}",
        "POST /webhooks/{webhook_id}/deliveries/{delivery_id}/resend",
    }  # fmt: skip


def test_every_operation_says_what_it_does_and_how_it_fails(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        assert operation["summary"], name
        assert operation["tags"], name
        assert any(status.startswith("2") for status in operation["responses"]), name
        if "{" in name:
            assert "404" in operation["responses"], name
        if operation["tags"] == ["health"]:
            continue
        assert operation["security"], name
        assert {"401", "422", "503"} <= set(operation["responses"]), name
        for status, response in operation["responses"].items():
            if status.startswith("4"):
                schema = response["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (name, status)


def test_every_body_and_every_object_has_an_example(document: dict[str, Any]) -> None:
    known = document["components"]["schemas"]
    for name, operation in operations(document):
        if name.startswith(("POST", "PUT", "PATCH")) and not name.endswith(
            ("/cancel", "/pause", "/resume", "/verify", "/resend", "/erase")
        ):
            for content in operation["requestBody"]["content"].values():
                assert content["example"], name
        for status, response in operation["responses"].items():
            schema = response.get("content", {}).get("application/json", {}).get("schema", {})
            if status.startswith("2") and "$ref" in schema:
                object_ = known[schema["$ref"].rpartition("/")[2]]
                items = object_["properties"].get("data", {}).get("items", {})
                target = known[items["$ref"].rpartition("/")[2]] if "$ref" in items else object_
                assert target.get("examples") or target["title"] == "File", name


def test_examples_are_what_they_illustrate() -> None:
    assert from_mapping(TrainingRequest, schema_examples.TRAINING).lora.rank == 16
    assert len(from_mapping(MergeRequest, schema_examples.MERGE).adapters) == 2
    assert from_mapping(ExportRequest, schema_examples.EXPORT).format == "gguf-merged"
    assert from_mapping(SearchRequest, schema_examples.SEARCH).per == "layer"
    assert len(from_mapping(AnalyzeRequest, schema_examples.ANALYZE).adapters) == 2
    assert from_mapping(ExtractRequest, schema_examples.EXTRACT).rank == 32
    assert from_mapping(WebhookRequest, schema_examples.WEBHOOK_REQUEST).name == "training bot"
    shown = (schemas.Dataset, schemas.Job, schemas.Event, schemas.Adapter, schemas.Artifact, schemas.BaseModel)
    for model in (*shown, schemas.Webhook, schemas.WebhookWithSecret, schemas.Delivery):
        extra: Any = model.model_config["json_schema_extra"]
        (example,) = extra["examples"]
        assert model.model_validate(example).model_dump() == example


def test_a_spec_is_documented_field_by_field(document: dict[str, Any]) -> None:
    content = document["paths"]["/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert content["schema"]["additionalProperties"] is False
    assert content["schema"]["required"] == ["base_model", "dataset"]
    training = content["schema"]["properties"]["training"]
    assert training["properties"]["learning_rate"]["default"] == 2e-4
    assert training["properties"]["quantization"]["enum"] == ["none", "nf4", "int8"]
    pattern = content["schema"]["properties"]["lora"]["properties"]["rank_pattern"]
    assert pattern["additionalProperties"] == {"type": "integer"}
    assert "$ref" not in str(content["schema"])
