"""``luthier demo``: a whole job on this machine, from the upload to the same prompt answered before and after."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from service import users
from service.cli.admin import DEMO_SOURCE, convert_demo_model, register_base_model
from service.cli.processes import is_ready
from service.db import Database
from service.settings import Settings

BASE_MODEL = "smollm2-135m-instruct"
_FILES = Path(__file__).parent
_START_SECONDS = 60.0
_ANSWER_TOKENS = 48  # an order in the house format takes about thirty
_TERMINAL = ("succeeded", "failed", "cancelled")


def demo(
    folder: Annotated[Path, typer.Option(help="where the service's data and the adapter go")] = Path(".demo"),
) -> None:
    """Start the service, train an adapter on an example dataset, and compare answers before and after."""
    started = time.monotonic()
    console = Console()
    os.environ["LUTHIER_DATA_DIR"] = str(folder.resolve() / "service")
    settings = Settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _service(settings, console) as url:
        console.print("Preparing the base model SmolLM2-135M-Instruct …")
        base_folder = convert_demo_model(settings)
        register_base_model(BASE_MODEL, base_folder, DEMO_SOURCE)
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {_key(settings)}"}, timeout=60) as client:
            job = _train(client, console)
            adapter = _download(client, job["adapter"], folder / "adapter")
    _compare(console, base_folder, adapter)
    console.print(f"\nThe adapter: {adapter}\nDone in {time.monotonic() - started:.0f} s.")


@contextmanager
def _service(settings: Settings, console: Console) -> Iterator[str]:
    """`luthier up` on a free port while the block runs; its output is in up.log."""
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    log_path = settings.data_dir / "up.log"
    console.print(f"Starting the service at {url} (log: {log_path}) …")
    with log_path.open("wb") as log:
        command = [sys.executable, "-m", "service.cli", "up", "--port", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    console.print(log_path.read_text(errors="replace")[-2000:], markup=False)
                    raise typer.Exit(1)
                time.sleep(0.1)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _key(settings: Settings) -> str:
    database = Database(settings.database_url)
    with database.unit_of_work() as session:
        user = users.user_by_name(session, "demo") or users.create_user(session, "demo")
        key = users.create_key(session, user.id)
    database.close()
    return key


def _train(client: httpx.Client, console: Console) -> dict[str, Any]:
    """Upload, post, watch. Returns the job once it has succeeded."""
    with (_FILES / "demo_orders.jsonl").open("rb") as file:
        dataset = _checked(client.post("/datasets", files={"file": ("orders.jsonl", file)}, data={"name": "orders"}))
    console.print(f"POST /datasets → {dataset['id']} ({dataset['rows']} examples)")
    body = {"base_model": BASE_MODEL, "dataset": dataset["id"], "name": "food orders"}
    body |= json.loads((_FILES / "demo_job.json").read_bytes())
    body["training"]["compute_dtype"] = _quickest_dtype()
    job = _checked(client.post("/jobs", json=body))
    console.print(f"POST /jobs → {job['id']} (QLoRA: NF4 base, rank {job['spec']['lora']['rank']})")
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  ETA {task.fields[eta]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("queued", total=None, loss="…", eta="…")
        seen = 0
        while job["status"] not in _TERMINAL:
            time.sleep(0.5)
            job = _checked(client.get(f"/jobs/{job['id']}"))
            events = _checked(client.get(f"/jobs/{job['id']}/events", params={"after": seen, "limit": 100}))["data"]
            losses = [event["data"]["loss"] for event in events if "loss" in event["data"]]
            seen = max([seen, *(event["seq"] for event in events)])
            eta = job["eta_seconds"]
            progress.update(bar, description=job["phase"] or job["status"], total=job["total_steps"])
            progress.update(bar, completed=job["step"], eta="…" if eta is None else f"{eta:.0f} s")
            if losses:
                progress.update(bar, loss=f"{losses[-1]:.3f}")
    if job["status"] != "succeeded":
        console.print(f"The job {job['status']}: {job['error']}")
        raise typer.Exit(1)
    return job


def _download(client: httpx.Client, adapter_id: str, folder: Path) -> Path:
    archive = folder.with_suffix(".tar")
    with client.stream("GET", f"/adapters/{adapter_id}/archive") as response:
        response.raise_for_status()
        with archive.open("wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    archive.unlink()
    (config,) = folder.rglob("adapter_config.json")
    return config.parent


def _compare(console: Console, base: Path, adapter: Path) -> None:
    """The same prompts, answered by the base model and by the base model with the adapter."""
    console.print("Asking both …")
    prompts = json.loads((_FILES / "demo_prompts.json").read_bytes())
    options = ["--adapter", str(adapter), "--compare", "--max-new-tokens", str(_ANSWER_TOKENS)]
    command = [sys.executable, "-m", "lora_engine", "generate", str(base), *options]
    asked = json.dumps([item["prompt"] for item in prompts])
    answers = json.loads(subprocess.run(command, input=asked, stdout=subprocess.PIPE, text=True, check=True).stdout)
    table = Table(title="The same prompt, before and after", show_lines=True)
    for heading in ("prompt", "base model", "with the adapter"):
        table.add_column(heading, ratio=1, overflow="fold")
    for item, answer in zip(prompts, answers, strict=True):
        table.add_row(*(Text(text) for text in (item["prompt"], answer["base"], answer["adapter"])))
    console.print(table)
    for name, speaker in (("base", "The base model"), ("adapter", "With the adapter")):
        right = sum(answer[name] == item["answer"] for item, answer in zip(prompts, answers, strict=True))
        console.print(
            f"{speaker}: {right} of {len(prompts)} answers are the JSON object that the house format asks for."
        )


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        typer.echo(f"{response.request.method} {response.request.url.path}: {response.text}", err=True)
        raise typer.Exit(1)
    body: dict[str, Any] = response.json()
    return body


def _quickest_dtype() -> str:
    """bf16 takes two thirds of the time on processors that multiply it, and much longer on those that do not."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii")
    except OSError:
        return "auto"
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "auto"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
