"""``make chaos``: the whole service under load while its parts are killed, restarted and emptied.

Two API processes, two workers, PostgreSQL and Valkey, all real. Every 20 seconds one process is killed (of each pair
always the same one: the other shows whether memory and descriptors stay flat), every 60 the database is stopped as by
a power cut, every 5 the broker is emptied. Afterwards everything must come to rest, and the invariants must hold.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import redis
from sqlalchemy import select

import migrations
from lora_engine.base_files import file_list
from service import base_models, datasets, sweep, users
from service.db import Database
from service.models import Job
from service.settings import Settings
from service.storage import open_storage
from tests import servers
from tests.faults import history
from tests.faults.chaos_load import TRAINING, Load
from tests.tiny_model import make_tiny_model
from tests.worker.bench import DESCRIPTION
from tests.worker.embedded import FAST

KILL_EVERY, RESTART_EVERY, FLUSH_EVERY = 20.0, 60.0, 5.0
REST_SECONDS = 150.0
MAX_GROWTH, MAX_MORE_DESCRIPTORS = 1.1, 10
_FAILURES = ("worker_lost", "process_died", "io_error", "storage_unavailable")


class Machine:
    """Every process of the service, started by the main thread and started again when it ends."""

    def __init__(self) -> None:
        self.folder = servers.short_folder()
        self.folder.chmod(0o755)
        self.launcher = servers.Launcher()
        url = servers.address(str(self.launcher.folder), "postgres").format(name="postgres")
        self.postgres: subprocess.Popen[bytes] = self.launcher._processes[0]
        self.broker = servers.Valkey()
        self.settings = Settings(data_dir=self.folder / "data", database_url=url, broker_url=self.broker.url)
        self.settings.data_dir.mkdir()
        migrations.upgrade(url)
        self.database, self.storage = Database(url), open_storage(self.settings.storage_url)
        self.key = self._set_up(make_tiny_model(self.folder / "model"))
        self.ports = {name: servers.free_port() for name in ("api 1", "api 2")}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.down_until = 0.0
        self.tend()

    def _set_up(self, model: Path) -> str:
        with self.database.unit_of_work() as session:
            values: dict[str, Any] = {"source": "tiny", "revision": None, "files": file_list(model)}
            base_models.add(session, "tiny", folder=model, description=DESCRIPTION, **values)
            return users.create_key(session, users.create_user(session, "ada").id)

    def tend(self) -> None:
        """Start what does not run."""
        if self.postgres.poll() is not None and time.monotonic() > self.down_until:
            identity: dict[str, Any] = {}
            if os.geteuid() == 0:
                identity = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            command: Any = self.postgres.args
            self.postgres = servers.start(command, self.launcher.folder, "postgres", **identity)
        own = {"DATA_DIR": self.settings.data_dir, "DATABASE_URL": self.settings.database_url,
               "BROKER_URL": self.broker.url, "REQUESTS_PER_SECOND": 1000}  # fmt: skip
        environment = os.environ | FAST | {f"LUTHIER_{name}": str(value) for name, value in own.items()}
        for name in ("api 1", "api 2", "worker 1", "worker 2"):
            if name not in self.processes or self.processes[name].poll() is not None:
                command = [sys.executable, "-m", "worker"]
                if name.startswith("api"):
                    command = [sys.executable, "-m", "service.cli", "api", "--port", str(self.ports[name])]
                self.processes[name] = servers.start(command, self.folder, name, env=environment)

    def kill(self, name: str) -> None:
        pid = self.processes[name.removesuffix("'s host")].pid
        with suppress(psutil.NoSuchProcess, ValueError):
            if name.endswith("'s host"):
                (pid,) = [child.pid for child in psutil.Process(pid).children()][:1]
            os.kill(pid, signal.SIGKILL)

    def stop_database(self, seconds: float) -> None:
        self.postgres.send_signal(signal.SIGQUIT)  # "immediate": what was not in the log is gone
        self.postgres.wait()
        self.down_until = time.monotonic() + seconds

    def flush(self) -> None:
        with redis.Redis(unix_socket_path=str(self.broker.socket)) as client:
            client.flushall()

    def weigh(self) -> dict[str, tuple[int, int]]:
        """Resident bytes and open descriptors of the two that nobody kills."""
        found = {}
        for name in ("api 2", "worker 2"):
            process = psutil.Process(self.processes[name].pid)
            found[name] = (process.memory_info().rss, process.num_fds())
        return found

    def close(self) -> None:
        self.database.close()
        for process in self.processes.values():
            servers.stop(process, signal.SIGTERM)
        servers.stop(self.postgres)
        self.broker.close()
        self.launcher.close()
        shutil.rmtree(self.folder)


def examples() -> bytes:
    """JSONL: 48 pairs."""
    pairs = [(f"say {number}", f"{number} it is " * 2) for number in range(48)]
    return b"".join(json.dumps({"prompt": asked, "completion": said}).encode() + b"\n" for asked, said in pairs)


def rage(machine: Machine, load: Load, seconds: float, chance: random.Random) -> tuple[Counter[str], dict[str, Any]]:
    """Break things for so long; how often each, and the weights after a quarter of the time."""
    victims = ["api 1", "worker 1", "worker 1's host", "worker 2's host"]
    began = time.monotonic()
    done: Counter[str] = Counter()
    due = {"kill": KILL_EVERY / 2, "database": RESTART_EVERY / 2, "flush": FLUSH_EVERY}
    weights: dict[str, Any] = {}
    while (elapsed := time.monotonic() - began) < seconds:
        machine.tend()
        if elapsed > due["kill"]:
            due["kill"] += KILL_EVERY
            victim = chance.choice(victims)
            machine.kill(victim)
            done[f"killed {victim}"] += 1
            print(f"{elapsed:5.0f} s  killed {victim}; {len(load.keys)} jobs accepted", flush=True)
        if elapsed > due["database"]:
            due["database"] += RESTART_EVERY
            away = chance.uniform(0, 3)
            machine.stop_database(away)
            done["database restarted"] += 1
            print(f"{elapsed:5.0f} s  database stopped for {away:.1f} s", flush=True)
        if elapsed > due["flush"]:
            due["flush"] += FLUSH_EVERY
            machine.flush()
            done["broker flushed"] += 1
        if elapsed > seconds / 4 and not weights:
            weights = machine.weigh()
        time.sleep(0.1)
    return done, weights


def settle(machine: Machine, load: Load) -> float:
    """Seconds until no job is left."""
    began = time.monotonic()
    while machine.postgres.poll() is not None:
        machine.tend()
        time.sleep(0.1)
    while load.unfinished():
        machine.tend()
        if time.monotonic() - began > REST_SECONDS:
            raise AssertionError(f"{load.unfinished()} jobs have not ended after {REST_SECONDS:.0f} s")
        time.sleep(1)
    return time.monotonic() - began


def judge(machine: Machine, load: Load, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises AssertionError with what does not hold."""
    assert not load.faults, "\n".join(load.faults)
    sweep.purge_deleted(machine.database, machine.storage)
    for _ in range(100):
        sweep.purge_leftovers(machine.database, machine.storage, grace_seconds=-1)
    datasets.sweep_abandoned(machine.database, machine.storage, machine.settings)
    every = TRAINING["checkpoint_every"]
    history.check(
        machine.database, machine.storage, accepted=load.keys.values(), keys=load.keys,
        checkpoint_every=int(every), collected=True,
    )  # fmt: skip
    with machine.database.reading() as session:
        jobs = session.scalars(select(Job)).all()
    assert {job.id for job in jobs} == set(load.keys.values()), "a job that nobody was told of"
    for job in jobs:
        assert job.state != "succeeded" or job.id not in load.cancelled, f"{job.id}: cancelled, and succeeded"
        assert job.state != "failed" or job.error_code in _FAILURES, f"{job.id}: {job.error_code} {job.error_message}"
    for name, (rss, descriptors) in after.items():
        assert rss < before[name][0] * MAX_GROWTH, f"{name}: {before[name][0]} → {rss} bytes"
        assert descriptors <= before[name][1] + MAX_MORE_DESCRIPTORS, f"{name}: {before[name][1]} → {descriptors}"


def run(seconds: float, seed: int) -> None:
    """One chaos run. Raises AssertionError."""
    print(f"chaos for {seconds:.0f} s, seed {seed}", flush=True)
    content = examples()
    machine = Machine()
    try:
        urls = [f"http://127.0.0.1:{port}" for port in machine.ports.values()]
        load = Load(urls, machine.key, seed, content)
        load.start()
        done, before = rage(machine, load, seconds, random.Random(seed))  # noqa: S311
        load.stop()
        rest = settle(machine, load)
        after = machine.weigh()
        with machine.database.reading() as session:
            jobs = session.scalars(select(Job)).all()
        print(f"at rest after {rest:.0f} s: {len(jobs)} jobs, {dict(Counter(job.state for job in jobs))}, "
              f"{sum(job.attempt for job in jobs)} attempts")  # fmt: skip
        print(f"broken: {dict(done)}\nanswers: {dict(load.answers)}; {load.events} events followed")
        for name in after:
            (was, had), (now_is, has) = before[name], after[name]
            print(f"{name}: {was >> 20} → {now_is >> 20} MB, {had} → {has} descriptors")
        judge(machine, load, before, after)
        print("the invariants hold")
    except BaseException:
        for log in sorted(machine.folder.glob("*.log")):
            lines = [line for line in log.read_text().splitlines() if "luthier.wake" not in line]
            print(f"--- {log.name}", *lines[-40:], sep="\n")
        raise
    finally:
        machine.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=360)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    arguments = parser.parse_args()
    run(arguments.seconds, arguments.seed)
