"""The production containers, really built and really used: ``make e2e-compose``.

Builds the images, brings everything up, trains an adapter over HTTP and downloads it, kills the worker in the middle
of a second job, and takes everything down again. Uses the Docker engine of this machine; where none answers, it
starts one of its own (root on Debian or Ubuntu) and keeps the layers in ~/.cache/luthier-e2e for the next time.
"""

import io
import json
import logging
import signal
import sys
import tarfile
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import safetensors.numpy
from e2e_containers import Project, engine, log, phase, wheels_override

BASE_MODEL = "smollm2-135m"
LORA = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
TRAINING = {"global_batch": 4, "sequence_length": 128, "validation_fraction": 0, "learning_rate": 1e-3}
JOB_SECONDS = 900

# What a user does.


def example_rows() -> bytes:
    """Chat examples that end every answer in a house style."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {a} plus {b}?"},
                {"role": "assistant", "content": f"It is {a + b}. Yours, the luthier."},
            ]
        }
        for a in range(8)
        for b in range(8)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def answer(response: httpx.Response) -> Any:
    if response.is_error:
        raise SystemExit(f"{response.request.url.path} answered {response.status_code}: {response.text}")
    return response.json()


def start_job(client: httpx.Client, dataset: str, **training: Any) -> str:
    body = {"base_model": BASE_MODEL, "dataset": dataset, "lora": LORA, "training": TRAINING | training}
    return str(answer(client.post("/jobs", json=body))["id"])


def wait_for(client: httpx.Client, job_id: str, *, step: int | None = None) -> dict[str, Any]:
    """The job once it has reached `step`, or once it has succeeded."""
    deadline = time.monotonic() + JOB_SECONDS
    while time.monotonic() < deadline:
        job: dict[str, Any] = answer(client.get(f"/jobs/{job_id}"))
        if job["status"] in ("failed", "cancelled"):
            raise SystemExit(f"the job ended as {job['status']}: {job['error']}")
        if job["status"] == "succeeded" or (step is not None and (job["step"] or 0) >= step):
            return job
        time.sleep(0.2)
    raise SystemExit(f"job {job_id} took more than {JOB_SECONDS} s")


def check_adapter(client: httpx.Client, adapter: str) -> None:
    """Download the archive as a user would, and look into the files."""
    response = client.get(f"/adapters/{adapter}/archive").raise_for_status()
    with tarfile.open(fileobj=io.BytesIO(response.content)) as archive:
        files = {Path(member.name).name: archive.extractfile(member) for member in archive if member.isfile()}
    contents = {name: file.read() for name, file in files.items() if file is not None}
    config = json.loads(contents["adapter_config.json"])
    tensors = safetensors.numpy.load(contents["adapter_model.safetensors"])
    trained = [name for name, tensor in tensors.items() if "lora_B" in name and tensor.any()]
    if config["r"] != LORA["rank"] or not trained or len(trained) * 2 != len(tensors):
        raise SystemExit(f"not the adapter that was trained: {config}, {len(trained)} of {len(tensors)} tensors")
    log.info("  %d bytes, %d tensors, rank %d", len(response.content), len(tensors), config["r"])


# What an operator relies on.


def check_confinement(project: Project) -> None:
    """The containers of ours run as nobody in particular, cannot write their image, and the worker has no way out."""
    for service in ("api", "worker"):
        if project.execute(service, "id", "-u") != "10001":
            raise SystemExit(f"{service} does not run as uid 10001")
        probe = "touch /probe 2>/dev/null || touch /app/probe 2>/dev/null || echo read-only"
        if project.execute(service, "sh", "-c", probe) != "read-only":
            raise SystemExit(f"{service} can write its image")
        if "CapEff:\t0000000000000000" not in project.execute(service, "cat", "/proc/self/status"):
            raise SystemExit(f"{service} has capabilities")
    check_no_way_out(project)
    check_secrets(project)


# Connections that training has no business with: by address, to the machine itself, by name, and without a connection.
OUTSIDE = """
import socket, struct
def gateways():
    for line in open("/proc/net/route").read().splitlines()[1:]:
        network, gateway = line.split()[1:3]
        yield socket.inet_ntoa(struct.pack("<I", int(gateway, 16) or int(network, 16) + (1 << 24)))
for address in ("1.1.1.1", "169.254.169.254", *gateways()):
    for port in (22, 53, 80, 443, 2375, 38997):
        try:
            socket.create_connection((address, port), 0.5).close()
            print("reached", address, port)
        except OSError:
            pass
try:
    print("resolved", socket.getaddrinfo("huggingface.co", 443)[0][4])
except OSError:
    pass
"""


def check_no_way_out(project: Project) -> None:
    """Not by the engine's word alone: the worker really tries, and so does the database."""
    for service in ("worker", "postgres", "redis"):
        if project.ways_out(service):
            raise SystemExit(f"{service} has a way out")
    if reached := project.execute("worker", "python", "-c", OUTSIDE):
        raise SystemExit(f"the worker gets out: {reached}")


def check_secrets(project: Project) -> None:
    """No secret in an environment, a command line, or what the engine tells; each service has its own alone."""
    for service in ("postgres", "redis", "migrate", "api", "worker"):
        told = project.told_by_the_engine(service)
        if service != "migrate":
            told += project.execute(service, "sh", "-c", "cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' ' '")
        if found := [name for name, secret in project.secrets.items() if secret and secret in told]:
            raise SystemExit(f"{service} shows {found}")
    for service in ("api", "worker"):
        mounted = set(project.execute(service, "ls", "/run/secrets").split())
        own = {f"{service}_database_password", "redis_password", "s3_secret_access_key"}
        if mounted != own:
            raise SystemExit(f"{service} has the secrets {mounted}, not {own}")


def use(project: Project) -> None:
    with phase("build both images"):
        project("build")
    with phase("up, until everything is healthy"):
        project("up", "--detach", "--wait")
    with phase("confinement"):
        check_confinement(project)
    with phase("demo base model"):
        project.execute("worker", "luthier", "base-models", "add", BASE_MODEL, "--demo")
    with phase("user and dataset"):
        key = project.execute("api", "luthier", "users", "add", "e2e")
        client = httpx.Client(
            base_url=f"http://{project.address}", headers={"Authorization": f"Bearer {key}"}, timeout=60
        )
        upload = client.post("/datasets", files={"file": ("examples.jsonl", example_rows())}, data={"name": "examples"})
        dataset = answer(upload)["id"]
    with phase("a QLoRA job"):
        job = wait_for(client, start_job(client, dataset, quantization="nf4", max_steps=2))
        check_adapter(client, job["adapter"])
    with phase("a job whose worker is killed"):
        job_id = start_job(client, dataset, max_steps=12, checkpoint_every=2)
        killed_at = wait_for(client, job_id, step=3)["step"]
        project.kill_everything_in("worker")
        job = wait_for(client, job_id)
        check_adapter(client, job["adapter"])
        if job["attempt"] < 2:
            raise SystemExit(f"killed at step {killed_at}, yet this is attempt {job['attempt']}")
        log.info("  killed at step %d, succeeded in attempt %d", killed_at, job["attempt"])


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(engine())
        project = Project(folder, stack.enter_context(wheels_override(folder)))
        try:
            use(project)
        except BaseException:
            log.error("%s", project("logs", "--no-color", "--tail", "60"))
            raise
        finally:
            # A second interrupt must not leave half of it behind.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            with phase("down"):
                project("down", "--volumes", "--remove-orphans", "--timeout", "20")
    log.info("all of it: %.1f s", time.monotonic() - started)


if __name__ == "__main__":
    main()
