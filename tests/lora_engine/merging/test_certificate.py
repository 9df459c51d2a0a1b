"""Norms from factors against dense ones, and how totals come from modules."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine.errors import AdapterError
from lora_engine.merging.certificate import ZERO, ModuleCertificate, Norms, exact_norms, norms, totals
from lora_engine.merging.result import rounded


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 20), st.integers(0, 9))
def test_norms_of_a_product(seed: int, out: int, width: int, rank: int) -> None:
    random = np.random.default_rng(seed)
    B, A = random.standard_normal((out, rank)), random.standard_normal((rank, width))
    for found in (norms(B, A), exact_norms(B, A)):
        assert found.frobenius == pytest.approx(float(np.linalg.norm(B @ A)), abs=1e-7)
        assert found.spectral == pytest.approx(float(np.linalg.norm(B @ A, 2)), abs=1e-7)


def test_what_almost_cancels() -> None:
    random = np.random.default_rng(0)
    B, A, change = random.standard_normal((30, 3)), random.standard_normal((3, 20)), random.standard_normal((30, 3))
    difference = np.concatenate([B, -(B + 1e-10 * change)], axis=1)
    found = exact_norms(difference, np.concatenate([A, A]))
    assert found.frobenius == pytest.approx(1e-10 * float(np.linalg.norm(change @ A)), rel=1e-4)


def certified(norm: float, error: float) -> ModuleCertificate:
    exact, off = Norms(norm, norm / 2), Norms(error, error / 2)
    return ModuleCertificate(exact, off, exact, off, error / 10, 8, 4, (exact, off))


def test_totals_are_of_one_block_diagonal_matrix() -> None:
    found = totals({"a": certified(3.0, 0.3), "b": certified(4.0, 0.4)})
    assert found["norm"] == 5.0
    assert found["frobenius"] == found["dense_frobenius"] == pytest.approx(0.1)
    assert found["spectral"] == pytest.approx(0.2 / 2.0)
    assert found["rounding"] == pytest.approx(0.01)
    assert (found["ranks_before"], found["rank"]) == (8, 4)


def test_a_module_that_should_be_zero() -> None:
    assert certified(0.0, 0.0).to_mapping()["frobenius"] == 0.0
    assert certified(0.0, 0.1).to_mapping()["frobenius"] is None
    assert "dense_frobenius" not in ModuleCertificate(ZERO, ZERO, ZERO, ZERO, 0.0, 0, 0).to_mapping()


@pytest.mark.parametrize(("dtype", "digits"), [("fp32", 24), ("fp16", 11), ("bf16", 8)])
def test_rounding_is_to_the_nearest_in_one_step(dtype: str, digits: int) -> None:
    random = np.random.default_rng(0)
    values = random.uniform(1, 2, 4000) * random.choice([-1, 1], 4000) * 2.0 ** random.integers(-10, 10, 4000)
    mantissa, exponent = np.frexp(values)
    expected = np.ldexp(np.rint(np.ldexp(mantissa, digits)), exponent - digits)
    np.testing.assert_array_equal(rounded(values, dtype, "m"), expected)
    # Just above halfway: by way of fp32 it would be a tie, and go down.
    tie = 1 + 2.0**-digits + 2.0**-40
    assert rounded(np.array([tie]), dtype, "m")[0] == 1 + 2.0 ** (1 - digits)


def test_what_a_type_cannot_hold() -> None:
    with pytest.raises(AdapterError, match="m: values beyond what fp16 holds; use fp32"):
        rounded(np.array([1e6]), "fp16", "m")
    assert rounded(np.array([1e6]), "bf16", "m")[0] == pytest.approx(1e6, rel=2**-8)
