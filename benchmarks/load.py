"""The API under load: ``python -m benchmarks.load [PART…]`` prints a table; ``--save`` writes it to benchmarks/results.

Everything shares the machine: PostgreSQL with durable commits, the API's processes, and this client. Parts: reads,
lists, submits, claims, streams, uploads. What is counted is read back from the database, not from the answers alone.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, text

from benchmarks._load_client import Connection, Timed, drive, percentile
from benchmarks._load_site import HEAVY, JOBS, USERS, Site, job_id, open_site, owner_of
from service import events, leases
from service.models import IdempotencyKey, Job

Row = tuple[str, str, str, bool]  # what, measured, gate, held
LINE = b'{"prompt": "What is the answer?", "completion": "' + b"word " * 200 + b'"}\n'
CONNECTIONS, SECONDS = 16, 8.0
STREAMS, STREAM_OWNERS, EVENTS = 500, 10, 8
UPLOADS, UPLOAD_BYTES = 16, 100 << 20


def reads(site: Site) -> list[Row]:
    """GET of single jobs: of all users, and of the one who has half of them."""

    def of(jobs: range) -> Callable[[Connection], Any]:
        async def one(connection: Connection) -> int:
            job = random.choice(jobs)  # noqa: S311
            return (await connection.request("GET", f"/jobs/{job_id(job)}", site.key(owner_of(job)))).status

        return one

    rows = []
    for whose, jobs in ((f"of {USERS} users", range(JOBS)), (f"of a user with {HEAVY}", range(HEAVY))):
        timed = asyncio.run(drive(site.ports, CONNECTIONS, SECONDS, of(jobs)))
        assert set(timed.answers) == {200}, Counter(timed.answers)
        held = timed.rate >= 500 and timed.percentile(0.99) < 100
        rows.append((f"`GET /jobs/{{id}}` {whose}, {JOBS} jobs", _rate(timed), "≥ 500/s, p99 < 100 ms", held))
    return rows


def lists(site: Site) -> list[Row]:
    """The first page, and one at the far end of the same list."""

    async def page(after: int) -> float:
        path = f"/jobs?limit=50&after={job_id(after)}"
        async with Connection(site.ports[0]) as connection:
            times = []
            for _ in range(60):
                began = time.perf_counter()
                answer = await connection.request("GET", path, site.key(0))
                times.append((time.perf_counter() - began) * 1000)
                assert len(json.loads(answer.body)["data"]) == 50
        return statistics.median(times)

    first, deep = asyncio.run(page(HEAVY)), asyncio.run(page(100))
    what = f"`GET /jobs?limit=50`: at the beginning, and {HEAVY - 100} jobs deep"
    return [(what, f"{first:.1f} ms, {deep:.1f} ms", "flat: ≤ 1.5×", deep <= 1.5 * first)]


def submits(site: Site) -> list[Row]:
    """POST with keys, one in ten of them sent twice; what was accepted is compared with the rows."""
    numbers = iter(range(10**9))

    async def one(connection: Connection) -> tuple[int, str, str]:
        number = next(numbers)
        user, key = (number - number % 10 // 9) % USERS, f"order-{number - number % 10 // 9}"
        body = json.dumps({"base_model": "tiny", "dataset": f"dataset-{user}"}).encode()
        headers = {"Content_Type": "application/json", "Idempotency_Key": key}
        answer = await connection.request("POST", "/jobs", site.key(user), body, **headers)
        return answer.status, key, json.loads(answer.body).get("id", "")

    timed = asyncio.run(drive(site.ports, CONNECTIONS, SECONDS, one))
    statuses = Counter(status for status, _, _ in timed.answers)
    promised: dict[str, set[str]] = {}
    for status, key, made in timed.answers:
        if status == 201:
            promised.setdefault(key, set()).add(made)
    with site.database.reading() as session:
        stored = dict(session.execute(select(IdempotencyKey.key, IdempotencyKey.job_id)).all())
        queued = session.scalar(select(func.count()).select_from(Job).where(Job.state == "queued")) or 0
    lost = sum(made != {stored.get(key)} for key, made in promised.items())
    doubled = queued - len(stored)
    measured = f"{_rate(timed)}; {lost} lost, {doubled} doubled of {len(promised)}"
    held = timed.rate >= 300 and not lost and not doubled and set(statuses) == {201}
    return [("`POST /jobs` with keys, a tenth sent twice", measured, "≥ 300/s, 0 lost, 0 doubled", held)]


def claims(site: Site) -> list[Row]:
    """Twenty workers take jobs of a tenth of a second until there are none."""
    with site.database.unit_of_work() as session:
        session.execute(text("UPDATE jobs SET state = 'cancelled', finished_at = 1 WHERE state = 'queued'"))
        session.execute(text(
            "INSERT INTO jobs (id, owner_id, kind, name, spec, base_model_id, dataset_id, state, priority, run_after,"
            " epoch, attempt, lost_without_progress, step, event_seq, created_at, announced_at) SELECT"
            " 'job-claim-' || j, 'user-' || j % 1000, 'train', 'job', '{}', 'tiny', 'dataset-0', 'queued', 0, 1,"
            " 0, 0, 0, 0, 0, 1, 1"
            " FROM generate_series(1, 1500) j"))  # fmt: skip
    taken: list[str] = []
    times: list[float] = []

    # Jobs of a tenth of a second: twenty workers that found one at once would measure how busy the machine is.
    def work(number: int) -> None:
        while True:
            began = time.perf_counter()
            with site.database.unit_of_work() as session:
                claim = leases.claim(session, f"worker-{number}", f"slot-{number}", 60)
            if claim is None:
                return
            times.append((time.perf_counter() - began) * 1000)
            taken.append(claim.job_id)
            time.sleep(0.1)
            with site.database.unit_of_work() as session:
                leases.fail(session, claim, "load", "user", "the end of a measurement")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    doubled = len(taken) - len(set(taken))
    measured = (
        f"p50 {percentile(times, 0.5):.1f} ms, p99 {percentile(times, 0.99):.1f} ms; {doubled} of {len(taken)} twice"
    )
    held = percentile(times, 0.99) < 50 and not doubled and len(taken) == 1500
    return [("claim and commit, 20 workers, jobs of 0.1 s", measured, "p99 < 50 ms, none twice", held)]


def streams(site: Site) -> list[Row]:
    """Event streams of jobs that tell one thing a second; in the middle all of them are cut and come back."""
    jobs = [f"job-stream-{number:03}" for number in range(STREAMS)]
    with site.database.unit_of_work() as session:
        for number, name in enumerate(jobs):
            session.add(Job(id=name, owner_id=f"user-{1 + number % STREAM_OWNERS}", kind="train", name="job", spec={},
                            base_model_id="tiny", state="paused", pause_requested_at=1.0))  # fmt: skip
    seen: dict[str, list[int]] = {name: [] for name in jobs}
    lags: list[float] = []

    async def follow(number: int, over: asyncio.Event) -> None:
        name = jobs[number]
        after = {"Last_Event_ID": str(seen[name][-1])} if seen[name] else {}
        async with Connection(site.ports[number % len(site.ports)]) as connection:
            key = site.key(1 + number % STREAM_OWNERS)
            await connection.send("GET", f"/jobs/{name}/events", key, 0, Accept="text/event-stream", **after)
            assert (await connection.head()).status == 200
            reading = asyncio.create_task(_read(connection, name))
            await over.wait()
            reading.cancel()

    async def _read(connection: Connection, name: str) -> None:
        async for line in connection.lines():
            if line.startswith(b"data: "):
                told = json.loads(line[6:])
                seen[name].append(told["seq"])
                lags.append((time.time() - told["created_at"]) * 1000)

    def tell() -> None:
        for _ in range(EVENTS):
            began = time.monotonic()
            for first in range(0, STREAMS, 25):
                with site.database.unit_of_work() as session:
                    for name in jobs[first : first + 25]:
                        events.append(
                            session, name, "Step 1: loss 2.0000", type="metrics", data={"step": 1, "loss": 2.0}
                        )
            time.sleep(max(0.0, 1 - (time.monotonic() - began)))

    async def both() -> list[float]:
        steady: list[float] = []
        for storm in (False, True):
            over = asyncio.Event()
            followers = [asyncio.create_task(follow(number, over)) for number in range(STREAMS)]
            if not storm:
                await asyncio.sleep(3)
            await asyncio.to_thread(tell)
            await asyncio.sleep(2)
            over.set()
            await asyncio.gather(*followers)
            if not storm:
                steady, lags[:] = list(lags), []
                await asyncio.to_thread(tell)  # while nobody listens
        return steady

    steady = asyncio.run(both())
    whole = sum(seqs == list(range(1, 3 * EVENTS + 1)) for seqs in seen.values())
    lag = f"p50 {percentile(steady, 0.5):.0f} ms, p99 {percentile(steady, 0.99):.0f} ms"
    return [
        (f"{STREAMS} event streams, one event a second each: lag", lag, "p99 < 1 s", percentile(steady, 0.99) < 1000),
        ("all of them come back at once: without a gap", f"{whole} of {STREAMS}", "all", whole == STREAMS),
    ]


def uploads(site: Site) -> list[Row]:
    """Sixteen large files at once, to one process; its memory meanwhile."""
    process = site.processes[0]
    before, over, peak = process.memory_info().rss, threading.Event(), 0
    block = LINE * 64

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    async def one(number: int) -> int:
        async with Connection(site.ports[0]) as connection:
            count = UPLOAD_BYTES // len(block)
            key = site.key(number)
            await connection.send("POST", "/datasets", key, count * len(block), Content_Type="application/jsonl")
            for _ in range(count):
                await connection.write(block)
            return (await connection.finish()).status

    async def everything() -> list[int]:
        return list(await asyncio.gather(*(one(number) for number in range(UPLOADS))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    statuses = asyncio.run(everything())
    seconds = time.perf_counter() - began
    over.set()
    watcher.join()
    assert set(statuses) == {201}, statuses
    grown = (peak - before) / (1 << 20)
    measured = f"{grown:.0f} MB more, {UPLOADS * UPLOAD_BYTES / (1 << 20) / seconds:.0f} MB/s"
    return [(f"{UPLOADS} uploads of {UPLOAD_BYTES >> 20} MB at once: memory", measured, "< 100 MB more", grown < 100)]


PARTS = {part.__name__: part for part in (reads, lists, submits, claims, streams, uploads)}


def _rate(timed: Timed) -> str:
    return f"{timed.rate:.0f}/s, p50 {timed.percentile(0.5):.0f} ms, p99 {timed.percentile(0.99):.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", help="all of them when left out")
    parser.add_argument("--processes", type=int, default=1, help="of the API")
    parser.add_argument("--save", action="store_true", help="into benchmarks/results")
    options = parser.parse_args()
    random.seed(1)
    rows: list[Row] = []
    with open_site(options.processes) as site:
        for name in options.parts or PARTS:
            rows += PARTS[name](site)
            print(*rows[-1:], flush=True)
    head = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
    head += f"{options.processes} API process(es), PostgreSQL and the client on the same machine"
    lines = [head, "", "| what | measured | gate | held |", "|---|---|---|---|"]
    lines += [f"| {what} | {measured} | {gate} | {'yes' if held else 'NO'} |" for what, measured, gate, held in rows]
    print("\n".join(lines))
    if options.save:
        _save(lines, head, rows)


def _save(lines: list[str], head: str, rows: list[Row]) -> None:
    path = Path(__file__).parent / "results" / f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-load-cpu"
    path.with_suffix(".md").write_text("# The API under load\n\n" + "\n".join(lines) + "\n")
    named = [dict(zip(("what", "measured", "gate", "held"), row, strict=True)) for row in rows]
    path.with_suffix(".json").write_text(json.dumps({"machine": head, "rows": named}, indent=1) + "\n")


if __name__ == "__main__":
    main()
