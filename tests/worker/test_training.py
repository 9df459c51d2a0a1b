"""What the host tells of a training, and what the worker makes of it: host and worker in one process."""

import json
import math
import threading
from pathlib import Path
from typing import Any, cast

import pytest
from safetensors.torch import load_file

from lora_engine import base_files, optim
from lora_engine.errors import Diverged
from service import leases
from tests.worker.bench import QUICK, Bench
from worker import training
from worker.channel import HostChannel, News, decode, encode
from worker.progress import Reporter
from worker.run import Attempt, _Listener
from worker.warm_base import WarmBase


class Told:
    """A channel whose news stay in a list, as they come out at the other end."""

    stop = None

    def __init__(self) -> None:
        self.news: list[News] = []

    def send(self, event: str, **data: Any) -> None:
        self.news.append(decode(encode(event, data)))


def train(folder: Path, model: Path, examples: bytes, **changes: Any) -> list[News]:
    (folder / "rows.jsonl").write_bytes(examples)
    spec = {
        "base_model": str(model), "base_model_name": "tiny", "dataset": str(folder / "rows.jsonl"),
        "output": str(folder / "output"), "lora": {"rank": 4}, "training": QUICK | changes,
    }  # fmt: skip
    base = {"id": "tiny", "folder": str(model), "digest": base_files.digest(model)}
    told = Told()
    warm = WarmBase(device="cpu", threads=0)
    training.train({"spec": spec, "base": base, "resume": None}, warm, cast(HostChannel, told))
    return told.news


def hear(bench: Bench, news: list[News]) -> str:
    """The next job, as if its host had told all this. Returns its id."""
    with bench.database.unit_of_work() as session:
        claim = leases.claim(session, "worker", "cpu:test", 60)
        assert claim is not None
        leases.start(session, claim)
    host: Any = None  # nobody is asked to stop
    attempt = Attempt(claim, bench.settings, bench.database, bench.storage, host, threading.Event())
    with Reporter(bench.database, claim, bench.settings) as reporter:
        listener = _Listener(attempt, reporter)
        for each in news:
            if each.event != "checkpoint":
                listener.hear(each)
        assert listener.ended
    return claim.job_id


def patch_norms(monkeypatch: pytest.MonkeyPatch, *norms: float) -> None:
    """The gradient norms of the first steps; the others are as they are."""
    given, clip = iter(norms), optim.clip
    monkeypatch.setattr(optim, "clip", lambda *arguments: next(given, None) or clip(*arguments))


def test_the_plan_tells_how_long_a_step_takes(bench: Bench, tmp_path: Path) -> None:
    (planned,) = [news.data for news in train(tmp_path, bench.model, bench.examples) if news.event == "planned"]
    assert 0 < planned["predicted_step_seconds"] < 60


def test_a_skipped_step_is_told_as_a_warning_and_without_what_is_no_number(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_norms(monkeypatch, 1.0, math.nan, 1.0)
    bench.submit()
    job_id = hear(bench, train(tmp_path, bench.model, bench.examples))
    points = bench.metrics(job_id)
    assert [point.get("skipped") for point in points] == [None, None, True, None, None, None, None]
    assert "grad_norm" not in points[2]
    assert (bench.job(job_id).state, bench.adapter(job_id).metrics["skipped_steps"]) == ("succeeded", 1)


def test_a_training_that_diverged_fails_and_leaves_its_last_good_adapter(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_norms(monkeypatch, 1.0, 1.0, math.nan, math.inf)
    bench.submit()
    job_id = hear(bench, train(tmp_path, bench.model, bench.examples, max_nonfinite_steps=2))
    job = bench.job(job_id)
    assert (job.state, job.error_code, job.error_category) == ("failed", "diverged", "user")
    assert "lower the learning rate" in str(job.error_message)
    adapter = bench.adapter(job_id)
    folder = bench.download(adapter, tmp_path / "adapter")
    assert any(
        bool(tensor.any()) for name, tensor in load_file(folder / "adapter_model.safetensors").items() if "B" in name
    )
    assert {file["name"] for file in adapter.files} >= {"README.md", "curves.svg", "lineage.json"}
    assert bench.messages(job_id)[-2] == "The last good adapter was kept"


def test_a_training_that_never_took_a_step_leaves_nothing(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_norms(monkeypatch, math.nan)
    with pytest.raises(Diverged):
        train(tmp_path, bench.model, bench.examples, max_nonfinite_steps=1)
    assert not (tmp_path / "output").exists()


def test_early_stopping_is_told_and_the_best_adapter_kept(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.submit()
    changes = {"epochs": 30, "eval_every": 1, "early_stopping_patience": 2, "learning_rate": 1.0, "warmup_ratio": 0.0}
    job_id = hear(bench, train(tmp_path, bench.model, bench.examples, **changes))
    metrics = bench.adapter(job_id).metrics
    assert metrics["stopped_early"]
    assert metrics["best_step"] == metrics["steps"] - 2
    assert {
        f"Stopped early after step {metrics['steps']}: the validation loss did not fall any more",
        f"The adapter is that of step {metrics['best_step']}, where the validation loss was lowest",
    } <= set(bench.messages(job_id))
    assert json.dumps(metrics, allow_nan=False)
