import io
from typing import Any

import pytest

from lora_engine import progress
from lora_engine.progress import Counter, Progress, clock
from lora_engine.step import Step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, **changes: Any) -> Step:
    values: dict[str, Any] = {
        "step": number, "total_steps": 8, "epoch": 0.5, "loss": 1.25, "learning_rate": 2e-4, "grad_norm": 0.5,
        "trained_tokens": 10, "tokens": 20, "seconds": 0.1, "validation_loss": None, "checkpoint_due": False,
        "tokens_per_second": 1234.4, "limit_fraction": 0.61, "recompute_share": 0.0, "peak_bytes": 2_100_000_000,
        "skipped": False, "computed_tokens": 16,
    }  # fmt: skip
    return Step(**values | changes)


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds a step."""
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(times)))


def test_a_file_gets_one_line_a_step_with_the_time_that_is_left(pace: None) -> None:
    stream = io.StringIO()
    shown = Progress(stream)
    shown.tell(step(1))
    shown.tell(step(2, validation_loss=1.5))
    shown.close()
    assert stream.getvalue().splitlines() == [
        "step 1/8  loss 1.2500  rate 2.00e-04  1,234 tokens/s  61% of the limit  2.10 GB  1:10 left",
        "step 2/8  loss 1.2500  validation loss 1.5000  rate 2.00e-04  1,234 tokens/s  61% of the limit  2.10 GB  "
        "1:00 left",
    ]


def test_the_pace_is_that_of_this_process_after_a_resume(pace: None) -> None:
    stream = io.StringIO()
    Progress(stream).tell(step(6))
    assert stream.getvalue().endswith("  0:20 left\n")


def test_a_terminal_gets_one_line_that_moves_and_keeps_what_matters(
    pace: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = Terminal()
    shown = Progress(stream)
    shown.tell(step(2))
    shown.tell(step(4, validation_loss=1.5))
    shown.tell(step(8, skipped=True, limit_fraction=None))
    shown.close()
    lines = stream.getvalue().split("\n")
    assert len(lines) == 4
    assert "validation loss 1.5000" in lines[0]
    assert lines[1].rpartition("\x1b[K")[2].startswith("step 8/8  skipped: not finite  rate")
    assert "of the limit" not in lines[1].rpartition("\x1b[K")[2]
    moving = [part.rstrip("\n") for part in stream.getvalue().split("\r\x1b[K") if "█" in part]
    assert [part.count("█") for part in moving] == [6, 12, 24]
    assert {len(part.splitlines()[0]) for part in moving} == {59}
    assert lines[-1] == ""


def test_nothing_is_written_for_a_training_without_steps() -> None:
    stream = Terminal()
    Progress(stream).close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (307, "5:07"), (3907, "1:05:07")])
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_work_that_is_counted_moves_on_a_terminal(pace: None) -> None:
    stream = Terminal()
    counter = Counter(stream, "merged")
    counter.tell(50, 200)
    counter.tell(200, 200)
    first, second = stream.getvalue().split("\r\x1b[K")[1:]
    assert first == "██████░░░░░░░░░░░░░░░░░░  merged 25%  0:30 left"
    assert second == "████████████████████████  merged 100%  0:00 left\n"


def test_elsewhere_it_is_a_line_per_tenth() -> None:
    stream = io.StringIO()
    counter = Counter(stream, "merged")
    for done in range(1, 201):
        counter.tell(done, 200)
    lines = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"merged {tenth}0%" for tenth in range(1, 11)]
    counter.tell(0, 0)
    assert stream.getvalue().splitlines() == lines
