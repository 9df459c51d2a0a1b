"""What an operator sets: secrets by file, and what is refused before anything starts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.settings import Settings

PASSWORD = "0123456789abcdef/@:"
PRODUCTION = {
    "LUTHIER_ENVIRONMENT": "production",
    "LUTHIER_DATABASE_URL": "postgresql+psycopg://luthier_api@postgres:5432/luthier",
    "LUTHIER_BROKER_URL": "redis://redis:6379/0",
}


@pytest.fixture
def production(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A complete production environment; the files its two secrets lie in."""
    for name, value in PRODUCTION.items():
        monkeypatch.setenv(name, value)
    files = {}
    for name in ("DATABASE_PASSWORD", "BROKER_PASSWORD"):
        files[name] = tmp_path / name
        files[name].write_text(f"{PASSWORD}\n")
        monkeypatch.setenv(f"LUTHIER_{name}_FILE", str(files[name]))
    return files


def test_secrets_come_from_files_and_are_not_shown(production: dict[str, Path]) -> None:
    settings = Settings()
    quoted = "0123456789abcdef%2F%40%3A"
    assert settings.database_url == f"postgresql+psycopg://luthier_api:{quoted}@postgres:5432/luthier"
    assert settings.broker_url == f"redis://:{quoted}@redis:6379/0"
    assert "0123456789" not in repr(settings)


@pytest.mark.parametrize(
    ("secret", "said"),
    [("", "has no password"), ("changeme", "placeholder"), ("15-characters..", "fewer than 16")],
)
@pytest.mark.parametrize("name", ["DATABASE_PASSWORD", "BROKER_PASSWORD"])
def test_production_refuses_a_secret_that_is_none(
    production: dict[str, Path], name: str, secret: str, said: str
) -> None:
    production[name].write_text(secret)
    with pytest.raises(ValueError, match=said) as refused:
        Settings()
    assert name.removesuffix("PASSWORD") in str(refused.value)
    assert PASSWORD not in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_BROKER_PASSWORD_FILE", "/run/secrets/none")
    with pytest.raises(ValueError, match="LUTHIER_BROKER_PASSWORD_FILE: /run/secrets/none: No such file"):
        Settings()


def test_one_value_from_two_places_is_refused(production: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_DATABASE_PASSWORD", "another-password-0123")
    with pytest.raises(ValueError, match="both set"):
        Settings()


def test_numbers_come_from_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lease").write_text("120\n")
    monkeypatch.setenv("LUTHIER_LEASE_SECONDS_FILE", str(tmp_path / "lease"))
    assert Settings().lease_seconds == 120


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.1.2.3"])
def test_this_machine_may_listen_to_itself(host: str) -> None:
    Settings().refuse_open_bind(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "", "api.example.org"])  # noqa: S104
def test_an_open_bind_needs_tls_before_it(host: str) -> None:
    with pytest.raises(ValueError, match="LUTHIER_BEHIND_TLS=yes"):
        Settings().refuse_open_bind(host)
    Settings(behind_tls=True).refuse_open_bind(host)


@pytest.mark.parametrize(
    ("published", "allowed"),
    [("127.0.0.1:8000", True), ("[::1]:8000", True), ("0.0.0.0:8000", False), ("8000", False), (":8000", False)],
)
def test_in_a_container_the_published_address_counts(published: str, allowed: bool) -> None:
    settings = Settings(bind=published)
    if allowed:
        settings.refuse_open_bind("0.0.0.0")  # noqa: S104
    else:
        with pytest.raises(ValueError, match="TLS"):
            settings.refuse_open_bind("0.0.0.0")  # noqa: S104


@pytest.mark.parametrize("command", ["api", "up"])
def test_commands_do_not_start_on_an_open_bind(tmp_path: Path, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", command, "--host", "0.0.0.0"],  # noqa: S104
        env=os.environ | {"LUTHIER_DATA_DIR": str(tmp_path / "data")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("not started: 0.0.0.0 can be reached")
    assert not (tmp_path / "data").exists()
