"""``luthier backup`` and ``luthier restore``: the database and the objects, to a folder or a bucket and back."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from service import backups
from service.db import Database
from service.errors import ServiceError
from service.settings import Settings
from service.storage import ObjectDamaged, ObjectMissing, Storage, open_storage

Place = Annotated[str, typer.Argument(help="a folder, or file:///… or s3://bucket/prefix; one for each backup")]


def backup(to: Place) -> None:
    """Copy the database and all objects while the service goes on."""
    with _parts(to) as (_, database, storage, place, scratch):
        made = backups.write(database, storage, place, scratch)
        typer.echo(f"{to}: {_described(made)}")


def restore(source: Place) -> None:
    """Bring a backup back into an empty database and an empty object store, every byte compared."""
    with _parts(source) as (settings, database, storage, place, scratch):
        made = backups.read_manifest(place)
        backups.refuse_occupied(database, storage)
        backups.restore_objects(made, place, storage, scratch)
        import migrations  # Alembic takes half a second, which the processes that serve do not need

        migrations.upgrade(settings.database_url, made.revision)
        backups.restore_rows(made, place, database, scratch)
        migrations.upgrade(settings.database_url)
        running = backups.requeue(database)
        typer.echo(f"{_described(made)} came back; {running} jobs that ran go on from their last checkpoint.")
        typer.echo("Now run `luthier migrate` where API and workers have logins of their own, then start them.")


@contextmanager
def _parts(place: str) -> Iterator[tuple[Settings, Database, Storage, Storage, Path]]:
    settings = Settings()
    url = place if "://" in place else Path(place).absolute().as_uri()
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database_url)
    try:
        with tempfile.TemporaryDirectory(dir=settings.work_dir, prefix="backup-") as scratch:
            yield settings, database, open_storage(settings.storage_url), open_storage(url), Path(scratch)
    except (ServiceError, ObjectMissing, ObjectDamaged) as error:
        kinds = {ObjectMissing: "missing: ", ObjectDamaged: "damaged: "}
        typer.echo(f"not done: {kinds.get(type(error), '')}{error}", err=True)
        raise typer.Exit(1) from None
    finally:
        database.close()


def _described(made: backups.Backup) -> str:
    rows = sum(table["rows"] for table in made.tables.values())
    return f"{rows} rows of {len(made.tables)} tables (revision {made.revision}) and {len(made.objects)} objects"
