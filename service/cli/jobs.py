"""What an operator decides about jobs: which of them goes first."""

from typing import Annotated

import typer

from service import jobs
from service.db import Database
from service.errors import NotFound
from service.settings import Settings

jobs_app = typer.Typer(help="Jobs.", no_args_is_help=True)


@jobs_app.callback()
def _jobs() -> None:
    """Keeps `priority` a command of its own while there is no other."""


@jobs_app.command("priority")
def set_priority(
    job_id: str, priority: Annotated[int, typer.Argument(min=-1000, max=1000, help="a lower number goes first")]
) -> None:
    """Let a job go before others, or after them: jobs begin with 0.

    One that waits with a lower number makes a running training of a higher one give way, at a checkpoint.
    """
    database = Database(Settings().database_url)
    try:
        with database.unit_of_work() as session:
            job = jobs.prioritise(session, job_id, priority)
        typer.echo(f"{job.id}  {job.state}  priority {job.priority}")
    except NotFound as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(1) from None
    finally:
        database.close()
