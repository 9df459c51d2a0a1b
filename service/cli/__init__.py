"""The console face: ``luthier up``, ``luthier demo``, and what an operator needs."""

import typer

from service.cli import admin, backup, demo, jobs, processes, up


def main() -> None:
    """The console script."""
    app = typer.Typer(
        name="luthier",
        help="Fine-tune language models with LoRA and QLoRA over HTTP.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command()(up.up)
    app.command()(demo.demo)
    app.command()(processes.api)
    app.command()(processes.worker)
    app.command()(processes.migrate)
    app.command()(processes.wait_ready)
    app.command()(backup.backup)
    app.command()(backup.restore)
    app.add_typer(admin.users_app, name="users")
    app.add_typer(admin.keys_app, name="keys")
    app.add_typer(admin.base_models_app, name="base-models")
    app.add_typer(jobs.jobs_app, name="jobs")
    app()
