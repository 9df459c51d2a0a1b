"""What ``e2e_compose.py`` runs on: an engine, the images that others make, and the compose project."""

import http.server
import importlib.resources
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STANDIN = ROOT / "docker" / "standin"
ENGINE = Path.home() / ".cache" / "luthier-e2e" / "engine"
COMPOSE = str(importlib.resources.files("compose") / "docker-compose")
WHEELS_PORT = 38997  # always the same, because the address is part of what the layers' cache compares
log = logging.getLogger("e2e")


@contextmanager
def phase(name: str) -> Iterator[None]:
    started = time.monotonic()
    log.info("%s …", name)
    yield
    log.info("%s: %.1f s", name, time.monotonic() - started)


def run(*command: str | Path) -> str:
    """Standard output of a command that must succeed; what it said is shown when it does not."""
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        log.error("%s\n%s", done.stdout[-8000:], done.stderr[-8000:])
        raise SystemExit(f"failed with {done.returncode}: {' '.join(map(str, command))}")
    return done.stdout


def works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextmanager
def engine() -> Iterator[None]:
    """DOCKER_HOST leads to an engine inside the block: this machine's, or one of our own with images for it."""
    if works("docker", "info"):
        yield
        return
    try:
        with phase("an engine of our own"):
            run(STANDIN / "engine.sh", "start", ENGINE)
        os.environ["DOCKER_HOST"] = f"unix://{ENGINE}/docker.sock"
        with phase("base images"):
            images = _base_images()
            if not all(works("timeout", "60", "docker", "pull", "--quiet", image) for image in images):
                run(STANDIN / "images.sh", *images)
        yield
    finally:
        run(STANDIN / "engine.sh", "stop", ENGINE)


def _base_images() -> list[str]:
    """The images that others make: of the Dockerfile, of postgres, of redis."""
    dockerfile, composed = (ROOT / "docker" / "Dockerfile").read_text(), (ROOT / "docker-compose.yml").read_text()
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)", dockerfile, re.MULTILINE)
    postgres, redis = (re.findall(rf"image: ({name}:\S+)", composed)[0] for name in ("postgres", "redis"))
    return [base, postgres, redis]


class Project:
    """The compose file under a name of its own, so that it never meets a real installation. `address` is the API's."""

    def __init__(self, folder: Path, overrides: list[Path]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        run("make", "--no-print-directory", "secrets", f"SECRETS={folder / 'secrets'}")
        self.secrets = {path.name: path.read_text() for path in (folder / "secrets").iterdir()}
        settings = {
            "SECRETS": str(folder / "secrets"),
            "LUTHIER_BIND": self.address,
            # Short, so that the killed worker's job is soon another's.
            "LUTHIER_LEASE_SECONDS": "10",
            "LUTHIER_HEARTBEAT_SECONDS": "3",
            "LUTHIER_POLL_SECONDS": "2",
            "LUTHIER_SWEEP_SECONDS": "2",
        }
        environment = folder / "env"
        environment.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
        files = [word for path in (ROOT / "docker-compose.yml", *overrides) for word in ("--file", str(path))]
        self._options = ["--project-name", "luthier-e2e", "--env-file", str(environment), *files, "--profile", "cpu"]

    def __call__(self, *command: str) -> str:
        """Standard output of `docker compose COMMAND`."""
        return run(COMPOSE, *self._options, *command)

    def execute(self, service: str, *command: str) -> str:
        return self("exec", "--no-TTY", service, *command).strip()

    def container(self, service: str) -> str:
        return self("ps", "--all", "--quiet", service).strip()

    def told_by_the_engine(self, service: str) -> str:
        """Everything that whoever may ask the engine learns about a container, its environment included."""
        return run("docker", "inspect", self.container(service))

    def ways_out(self, service: str) -> list[str]:
        """The networks of a service that the engine lets through to the outside."""
        names = run("docker", "inspect", "--format", "{{json .NetworkSettings.Networks}}", self.container(service))
        inspect = ("docker", "network", "inspect", "--format", "{{.Internal}}")
        return [name for name in json.loads(names) if run(*inspect, name) != "true\n"]

    def kill_everything_in(self, service: str) -> None:
        """SIGKILL as the kernel sends it when memory runs out; returns once the restart policy has done its work."""
        container = self.container(service)
        # Not `docker kill`, which counts as stopped by an operator and is not restarted.
        works("docker", "exec", container, "sh", "-c", "kill -9 -1")
        deadline = time.monotonic() + 60
        while run("docker", "inspect", "--format", "{{.RestartCount}} {{.State.Running}}", container) != "1 true\n":
            if time.monotonic() > deadline:
                raise SystemExit(f"{service} did not come back")
            time.sleep(0.2)


@contextmanager
def wheels_override(folder: Path) -> Iterator[list[Path]]:
    """Where this machine's pip prefers a folder of wheels, an addition to the compose file that lends it to the builds.

    They reach it over HTTP, through the host's network. With it goes the torch index: the folder has the build to use.
    """
    source = _wheels()
    if source is None or not Path(source).is_dir():
        yield []
        return

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", WHEELS_PORT), partial(Quiet, directory=source)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        links = f"http://127.0.0.1:{WHEELS_PORT}/"
        override = folder / "wheels.yml"
        arguments = f"{{UV_FIND_LINKS: '{links}', UV_TORCH_BACKEND: !reset null}}"
        override.write_text(
            "services:\n"
            "  api: {build: {network: host}}\n"
            "  migrate: {build: {network: host}}\n"
            f"  worker: {{build: {{network: host, args: {arguments}}}}}\n"
        )
        yield [override]
        server.shutdown()


def _wheels() -> str | None:
    for name in ("UV_FIND_LINKS", "PIP_FIND_LINKS"):
        if os.environ.get(name):
            return os.environ[name]
    asked = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() or None
