"""/webhooks: URLs that are told when jobs end, and what was sent to them."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from service import schema_examples, schemas, webhooks
from service.api.errors import documented
from service.api.request import After, Caller, Inside, JsonBody, Limit, Parts, body_schema, parse
from service.errors import Forbidden
from service.models import Webhook, WebhookDelivery
from service.webhook_addresses import Policy

router = APIRouter(prefix="/webhooks", tags=["webhooks"])
DeliveryState = Literal["pending", "delivered", "dead"]


@router.post(
    "",
    status_code=201,
    summary="Have a URL told when jobs end",
    responses=documented(400, 403, 409, 413, 415),
    openapi_extra=body_schema(webhooks.WebhookRequest, schema_examples.WEBHOOK_REQUEST),
)
def create_webhook(caller: Caller, parts: Inside, body: JsonBody) -> schemas.WebhookWithSecret:
    """Every message is a POST of JSON, signed as Standard Webhooks says: `webhook-id`, `webhook-timestamp` and
    `webhook-signature`, with the secret of this answer, which is shown this once. Any answer but 2xx within 5 seconds
    has the message sent again, up to ten times in three days; 410 disables the webhook."""
    _allowed(parts)
    request = parse(webhooks.WebhookRequest, body)
    url = webhooks.check_url(request.url, Policy.of(parts.settings))
    with parts.database.unit_of_work() as session:
        row = webhooks.create(session, caller.user_id, request, url or request.url)
    return schemas.WebhookWithSecret(**_webhook(row).model_dump(), secret=row.secret)


@router.get("", summary="List webhooks", responses=documented(422))
def list_webhooks(caller: Caller, parts: Inside, after: After = None, limit: Limit = 20) -> schemas.Webhooks:
    with parts.database.reading() as session:
        rows, more = webhooks.page(session, caller.user_id, after, limit)
        return schemas.Webhooks.of([_webhook(row) for row in rows], more)


@router.get("/{webhook_id}", summary="A webhook", responses=documented(404))
def get_webhook(caller: Caller, parts: Inside, webhook_id: str) -> schemas.Webhook:
    with parts.database.reading() as session:
        return _webhook(webhooks.get(session, caller.user_id, webhook_id))


@router.patch(
    "/{webhook_id}",
    summary="Change a webhook",
    responses=documented(400, 403, 404, 413, 415),
    openapi_extra=body_schema(webhooks.WebhookChange, {"enabled": False}),
)
def change_webhook(caller: Caller, parts: Inside, webhook_id: str, body: JsonBody) -> schemas.Webhook:
    """What is left out stays as it is. Messages that wait are sent to the new URL."""
    _allowed(parts)
    wanted = parse(webhooks.WebhookChange, body)
    with parts.database.reading() as session:
        webhooks.get(session, caller.user_id, webhook_id)
    url = webhooks.check_url(wanted.url, Policy.of(parts.settings))
    with parts.database.unit_of_work() as session:
        return _webhook(webhooks.change(session, caller.user_id, webhook_id, wanted, url))


@router.delete("/{webhook_id}", summary="Delete a webhook", responses=documented(404))
def delete_webhook(caller: Caller, parts: Inside, webhook_id: str) -> schemas.Deleted:
    """With what was sent to it, and what was to be."""
    with parts.database.unit_of_work() as session:
        webhooks.delete(session, caller.user_id, webhook_id)
    return schemas.Deleted(id=webhook_id, object="webhook")


@router.get("/{webhook_id}/deliveries", summary="What a webhook was sent", responses=documented(404, 422))
def list_deliveries(
    caller: Caller,
    parts: Inside,
    webhook_id: str,
    after: After = None,
    limit: Limit = 20,
    state: Annotated[DeliveryState | None, Query(description="dead: not sent after ten attempts")] = None,
) -> schemas.Deliveries:
    """Newest first. Kept for 30 days."""
    with parts.database.reading() as session:
        rows, more = webhooks.deliveries(session, caller.user_id, webhook_id, after, limit, state=state)
        return schemas.Deliveries.of([_delivery(row) for row in rows], more)


@router.get("/{webhook_id}/deliveries/{delivery_id}", summary="A delivery", responses=documented(404))
def get_delivery(caller: Caller, parts: Inside, webhook_id: str, delivery_id: str) -> schemas.Delivery:
    with parts.database.reading() as session:
        return _delivery(webhooks.delivery(session, caller.user_id, webhook_id, delivery_id))


@router.post(
    "/{webhook_id}/deliveries/{delivery_id}/resend",
    summary="Send a message again",
    responses=documented(403, 404, 409),
)
def resend(caller: Caller, parts: Inside, webhook_id: str, delivery_id: str) -> schemas.Delivery:
    """Whatever came of it before, with all its attempts anew and the same `webhook-id`."""
    _allowed(parts)
    with parts.database.unit_of_work() as session:
        return _delivery(webhooks.resend(session, caller.user_id, webhook_id, delivery_id))


def _allowed(parts: Parts) -> None:
    if not parts.settings.webhooks:
        raise Forbidden("webhooks are off; the operator can allow them with LUTHIER_WEBHOOKS", code="webhooks_off")


def _webhook(row: Webhook) -> schemas.Webhook:
    return schemas.Webhook(
        id=row.id, name=row.name, url=row.url, event_types=row.event_types, enabled=row.enabled,
        created_at=row.created_at,
    )  # fmt: skip


def _delivery(row: WebhookDelivery) -> schemas.Delivery:
    return schemas.Delivery(
        id=row.id,
        webhook=row.webhook_id,
        job=row.job_id,
        event_type=row.event_type,
        body=row.body,
        state=row.state,  # type: ignore[arg-type]
        attempts=row.attempts,
        next_attempt_at=row.next_attempt_at if row.state == "pending" else None,
        last_status=row.last_status,
        last_error=row.last_error,
        created_at=row.created_at,
        delivered_at=row.delivered_at,
    )
