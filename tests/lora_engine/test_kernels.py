import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_engine import kernels

compiled = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")


@pytest.fixture
def _forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A new cache folder, and nothing compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels.library.cache_clear()
    yield
    kernels.library.cache_clear()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 64, 5003])
def test_the_loss_and_its_gradient_are_those_of_float64(dtype: torch.dtype, width: int) -> None:
    logits = (5 * normal(7, width)).to(dtype)
    targets = torch.arange(7) * 13 % width
    scales = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.1, 1.0])
    twin = logits.double().requires_grad_()
    expected = -twin.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (expected * scales).sum().backward()
    untouched = logits.clone()
    losses = kernels.softmax_loss(untouched, targets, None)
    assert torch.equal(untouched, logits)
    assert torch.equal(kernels.softmax_loss(logits, targets, scales), losses)
    torch.testing.assert_close(losses, expected.detach().float(), rtol=1e-5, atol=1e-5)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8
    assert twin.grad is not None
    torch.testing.assert_close(logits.double(), twin.grad, rtol=tolerance, atol=1e-7)


@compiled
def test_a_logit_that_is_not_a_number_makes_the_loss_none() -> None:
    logits = normal(2, 70)
    logits[0, 68] = float("nan")
    losses = kernels.softmax_loss(logits, torch.zeros(2, dtype=torch.int64), None)
    assert losses.isnan().tolist() == [True, False]


@compiled
def test_brain_floats_are_rounded_to_the_nearest_even_as_torch_rounds_them() -> None:
    x = torch.cat([normal(1000), torch.tensor([1.00390625, 1.01171875, float("inf"), -0.0, 3e38])])
    x = torch.stack([torch.full_like(x, 1e4), x], 0).flatten()[None]  # silu(1e4) · x = 1e4 · x
    gate_up = torch.cat([x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]], 1)
    wide = kernels.silu_product(gate_up.bfloat16().float())
    assert torch.equal(kernels.silu_product(gate_up.bfloat16()), wide.bfloat16())


@compiled
def test_threads_change_no_bit() -> None:
    x, weight, before = normal(300, 100), normal(100, seed=1), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(kernels.norm_forward(x, weight, 1e-6, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@compiled
@pytest.mark.usefixtures("_forgotten")
def test_it_is_compiled_once_into_the_users_cache(tmp_path: Path) -> None:
    assert kernels.library() is not None
    (path,) = (tmp_path / "luthier").iterdir()
    made = path.stat().st_mtime_ns
    kernels.library.cache_clear()
    assert kernels.library() is not None
    assert path.stat().st_mtime_ns == made


@compiled
@pytest.mark.usefixtures("_forgotten")
def test_where_nothing_can_be_kept_it_is_compiled_anew_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    passing = tmp_path / "passing"
    passing.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(passing))
    assert kernels.library() is not None
    assert list(passing.iterdir()) == []


@pytest.mark.usefixtures("_forgotten")
def test_without_a_compiler_pytorch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert kernels.library() is None
    assert not kernels.serve(torch.device("cpu"), torch.float32)


@pytest.mark.usefixtures("_forgotten")
def test_a_compiler_that_fails_is_told_of_and_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "bin" / "c++"
    broken.parent.mkdir()
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "no space left" >&2; exit 1; }\n')
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken.parent}:/bin:/usr/bin")
    with caplog.at_level(logging.WARNING):
        assert kernels.library() is None
    assert "no space left" in caplog.text
    assert list((tmp_path / "luthier").iterdir()) == []


def test_only_plain_types_on_the_cpu_are_served() -> None:
    assert not kernels.serve(torch.device("cpu"), torch.float64)
    assert not kernels.serve(torch.device("meta"), torch.float32)


KINDS = [torch.float32, torch.bfloat16, torch.float16]


@compiled
@pytest.mark.parametrize("stored", KINDS)
@pytest.mark.parametrize("written", KINDS)
@pytest.mark.parametrize(("rows", "width", "rank"), [(37, 200, 5), (4, 64, 48), (1, 1, 1), (3, 130, 0)])
def test_a_product_is_added_and_rounded_once(
    stored: torch.dtype, written: torch.dtype, rows: int, width: int, rank: int
) -> None:
    if not kernels.adds(stored, written):
        pytest.skip("this processor does not convert halves")
    weight, left, right = normal(rows, width).to(stored), normal(rows, rank, seed=1), normal(rank, width, seed=2)
    result = torch.empty(rows, width, dtype=written)
    squares = kernels.add_product(weight, left, kernels.panels(right), result)
    exact = weight.double() + left.double() @ right.double()
    # A unit in the last place of the fp32 sum's terms, and half a unit of the type that is written.
    last_place = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[written]
    terms = weight.double().abs() + left.double().abs() @ right.double().abs()
    assert bool(((result.double() - exact).abs() <= last_place * exact.abs() + 2.0**-22 * terms + 1e-7).all())
    if written != torch.float32:
        assert squares == pytest.approx(float((result.double() - exact).square().sum()), rel=1e-3, abs=1e-10)


@compiled
def test_the_rounding_of_a_fp32_sum_is_told_exactly() -> None:
    weight, delta = normal(9, 70) * 1e3, normal(9, 70, seed=1)
    result = torch.empty_like(weight)
    squares = kernels.add_product(weight, torch.eye(9), kernels.panels(delta), result)
    lost = weight.double() + delta.double() - result.double()
    assert squares == pytest.approx(float(lost.square().sum()), rel=1e-5)
    assert squares > 0


@compiled
def test_rows_computed_alone_or_in_place_have_the_same_bits() -> None:
    weight, left, right = normal(50, 100).bfloat16(), normal(50, 7, seed=1), kernels.panels(normal(7, 100, seed=2))
    whole = torch.empty_like(weight)
    kernels.add_product(weight, left, right, whole)
    for start, stop in ((0, 3), (3, 22), (22, 50)):
        kernels.add_product(weight[start:stop], left[start:stop], right, weight[start:stop])
    assert torch.equal(weight, whole)


@compiled
def test_a_sum_that_its_type_cannot_hold_has_no_finite_rounding() -> None:
    weight, result = torch.full((2, 3), 1e5), torch.empty(2, 3, dtype=torch.float16)
    if not kernels.adds(weight.dtype, result.dtype):
        pytest.skip("this processor does not convert halves")
    assert kernels.add_product(weight, torch.zeros(2, 0), kernels.panels(torch.zeros(0, 3)), result) == float("inf")
