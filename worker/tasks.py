"""The Celery tasks. A message is a hint that there may be work; what there is to do stands in the database."""

from celery import Celery

from service.queue import WAKE
from worker.supervisor import Supervisor


def register(celery: Celery, supervisor: Supervisor) -> None:
    """Tie the task names to this worker's supervisor."""

    @celery.task(name=WAKE)  # type: ignore[untyped-decorator]
    def wake(job_id: str) -> None:  # noqa: ARG001 - says in the broker's log which job was announced
        supervisor.work()
