"""What the benchmark for GPUs reckons with; it itself is run by `python -m benchmarks.gpu --toy`."""

import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import report
from benchmarks.gpu.bases import dequantised, ours, theirs
from benchmarks.gpu.documents import alpaca_lengths, documents, examples_a_step
from benchmarks.gpu.jobs import percentile
from benchmarks.gpu.profiled import covered
from benchmarks.gpu.run import Run
from benchmarks.gpu.shapes import ALPACA, TOY, write_config


def test_overlapping_kernels_are_counted_once() -> None:
    assert covered([(0, 4), (1, 2), (3, 6), (10, 11)]) == 7


def test_percentiles_are_of_the_values() -> None:
    assert [percentile([3.0, 1.0, 2.0, 4.0], share) for share in (0.5, 0.9, 0.99)] == [2.0, 4.0, 4.0]


def test_prompts_are_no_targets() -> None:
    lengths, _ = alpaca_lengths(None, None, 5)
    found = documents(ALPACA, 7, 512, lengths)
    assert [(len(item), item.trained_tokens) for item in found[:5]] == [(sum(pair), pair[1]) for pair in lengths]
    assert examples_a_step(512, 8192, lengths) == 16


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_ours_and_theirs_have_the_same_weights(tmp_path: Path, quantization: str) -> None:
    folder = write_config(tmp_path, "toy")
    own = dequantised(ours(folder, quantization, torch.device("cpu")))
    other = theirs(folder, "none", torch.device("cpu")).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    error = (own[name] - other[name].float()).norm() / own[name].norm()
    assert error == 0 if quantization == "none" else 0.01 < error < 0.2
    assert torch.equal(own["lm_head.weight"], other["lm_head.weight"].float())


def test_a_process_that_ends_is_a_row_that_says_why(tmp_path: Path) -> None:
    run = Run("cpu", TOY, tmp_path, [(1, 1)], None, None, {}, part="speed", deadline=time.monotonic() + 60)
    run.stream("cells.nothing", {"title": "nothing"}, ["one", "two"])
    assert [(row["name"], row["status"]) for row in run.rows["speed"]] == [("one", "not run"), ("two", "not run")]
    assert "nothing" in run.rows["speed"][0]["why"]
    assert "| one | not run |" in report.table(run.rows["speed"])
