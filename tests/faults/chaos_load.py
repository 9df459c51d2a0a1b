"""The mixed load of the chaos run: a client that never gives up, and that remembers all that it was promised."""

import random
import threading
import time
from collections import Counter
from typing import Any

import httpx

TRAINING = {"global_batch": 8, "sequence_length": 128, "checkpoint_every": 20, "learning_rate": 0.01, "epochs": 60}
ENDED = ("succeeded", "failed", "cancelled")
_PATIENCE_SECONDS = 120.0


class Load:
    """Threads that submit, read, upload, merge, cancel and follow until `stop`.

    Attributes:
        keys: the job that each Idempotency-Key was answered with, and so all that was accepted.
        cancelled: jobs of which a cancel was answered with 202.
        answers: how often each status came, "none" for a connection that broke.
    """

    def __init__(self, urls: list[str], api_key: str, seed: int, examples: bytes) -> None:
        self.keys: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.answers: Counter[str] = Counter()
        self.faults: list[str] = []
        self.events = 0
        self._urls, self._headers, self._examples = urls, {"Authorization": f"Bearer {api_key}"}, examples
        self._random = random.Random(seed)  # noqa: S311
        self._stopping = threading.Event()
        self._dataset = ""
        works = (self._submit, self._read, self._upload, self._merge, self._follow)
        self._threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in works]

    def start(self) -> None:
        self._dataset = self._store()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(_PATIENCE_SECONDS)
            if thread.is_alive():
                self.faults.append(f"{thread.name} hangs")

    def unfinished(self) -> int:
        return sum(self.get(f"/jobs/{job_id}")["status"] not in ENDED for job_id in self.keys.values())

    def get(self, path: str) -> Any:
        return self._ask("GET", path).json()

    def _guarded(self, work: Any) -> None:
        try:
            while not self._stopping.is_set():
                work()
        except Exception as error:  # told at the end
            self.faults.append(f"{work.__name__}: {error!r}")

    def _ask(self, method: str, path: str, key: str | None = None, **content: Any) -> httpx.Response:
        """Until it is answered by something other than 503 or 429. Raises AssertionError for a 500."""
        headers = self._headers | ({"Idempotency-Key": key} if key else {}) | content.pop("headers", {})
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            url = self._random.choice(self._urls)
            try:
                answer = httpx.request(method, f"{url}{path}", headers=headers, timeout=40, **content)
            except httpx.TransportError:
                self.answers["none"] += 1
            else:
                self.answers[str(answer.status_code)] += 1
                assert answer.status_code != 500, f"{method} {path}: {answer.text}"
                if answer.status_code not in (429, 503):
                    return answer
            assert time.monotonic() < deadline, f"{method} {path}: no answer in {_PATIENCE_SECONDS} s"
            time.sleep(0.3)

    def _store(self) -> str:
        answer = self._ask("POST", "/datasets", content=self._examples, headers={"content-type": "application/jsonl"})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def _take(self, path: str, body: dict[str, Any]) -> str:
        """A job, with a new key. Asked again when the answer was lost, and sometimes for no reason."""
        key = f"key-{len(self.keys)}-{threading.get_ident()}"
        answers = [self._ask("POST", path, key, json=body) for _ in range(self._random.choice((1, 1, 2)))]
        for answer in answers:
            assert answer.status_code in (200, 201, 202), answer.text
        told = [answer.json() for answer in answers]  # of a merge that was made at once: its adapter
        ids = {said["id"] if said["id"].startswith("job-") else said["job"] for said in told}
        assert len(ids) == 1, f"one key was answered with {ids}"
        self.keys[key] = ids.pop()
        return self.keys[key]

    def _submit(self) -> None:
        body = {"base_model": "tiny", "dataset": self._dataset, "lora": {"rank": 4}}
        job_id = self._take("/jobs", body | {"training": TRAINING | {"seed": len(self.keys)}})
        if self._random.random() < 0.2:
            self._stopping.wait(self._random.uniform(0, 4))
            if self._ask("POST", f"/jobs/{job_id}/cancel").status_code == 202:
                self.cancelled.add(job_id)
        self._stopping.wait(self._random.uniform(3, 7))

    def _read(self) -> None:
        for path in ("/jobs", "/adapters", "/datasets"):
            for row in self.get(path)["data"][:3]:
                assert self._ask("GET", f"{path}/{row['id']}").status_code in (200, 404)
        self._stopping.wait(0.5)

    def _upload(self) -> None:
        dataset_id = self._store()
        assert self._ask("GET", f"/datasets/{dataset_id}/content").content == self._examples
        assert self._ask("DELETE", f"/datasets/{dataset_id}").status_code in (200, 404)
        self._stopping.wait(2)

    def _merge(self) -> None:
        found = [row["id"] for row in self.get("/adapters")["data"]]
        if len(found) >= 2:
            two = self._random.sample(found, 2)
            pair = [{"adapter": id_, "weight": round(self._random.random(), 6)} for id_ in two]
            self._take("/adapters/merge", {"adapters": pair})
        self._stopping.wait(8)

    def _follow(self) -> None:
        """One job from its first event to its last, over as many connections as it takes."""
        rows = self.get("/jobs?kind=train")["data"]
        if not rows:
            self._stopping.wait(1)
            return
        job_id, last = self._random.choice(rows)["id"], 0
        while not self._stopping.is_set():
            headers = self._headers | {"accept": "text/event-stream", "Last-Event-ID": str(last)}
            url = f"{self._random.choice(self._urls)}/jobs/{job_id}/events"
            try:
                with httpx.stream("GET", url, headers=headers, timeout=20) as answer:
                    if answer.status_code == 204:
                        return
                    for line in answer.iter_lines() if answer.status_code == 200 else ():
                        if line.startswith("id: "):
                            assert int(line[4:]) == last + 1, f"{job_id}: event {line[4:]} after {last}"
                            last += 1
                            self.events += 1
                        if self._stopping.is_set():
                            return
            except httpx.TransportError:
                self.answers["none"] += 1
            time.sleep(0.3)
