"""Recipes that say the same have the same digest; any others have not."""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine.merging import recipe as module
from lora_engine.merging.config import MergeConfig
from lora_engine.merging.recipe import WeightedDigest, digest, recipe

A, B = "a" * 64, "b" * 64


def of(*sources: WeightedDigest, base: str | None = "base", config: MergeConfig = MergeConfig()) -> str:  # noqa: B008
    return digest(recipe(config, sources, base))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("xyz"), st.floats(-10, 10), st.just({})), min_size=1, max_size=4))
def test_the_order_does_not_count(sources: list[WeightedDigest]) -> None:
    assert len({of(*order) for order in permutations(sources)}) == 1


def test_the_same_adapter_twice_adds_up() -> None:
    assert of((A, 1.0, {}), (B, 1.0, {}), (A, 0.5, {})) == of((B, 1, {}), (A, 1.5, {}))
    assert of((A, 1.0, {"q": 1.0}), (A, 2.0, {"q": 3})) == of((A, 3.0, {"q": 4.0}))
    assert of((A, 1.0, {"q": 1.0}), (A, 2.0, {})) != of((A, 3.0, {"q": 1.0}))
    assert of((A, -0.0, {}), (B, 1, {})) == of((A, 0.0, {}), (B, 1, {}))


def test_defaults_may_be_left_out() -> None:
    assert of((A, 1, {}), config=MergeConfig(method="ties")) == of(
        (A, 1, {}), config=MergeConfig(method="ties", density=0.5, election="mass", scope="module", dtype="fp32")
    )
    assert of((A, 1, {}), config=MergeConfig(method="ties", density=1)) == of(
        (A, 1, {}), config=MergeConfig(method="ties", density=1.0)
    )


def test_everything_else_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = of((A, 1.0, {}), (B, 1.0, {}))
    others = {
        of((A, 1.0, {}), (B, 2.0, {})),
        of((A, 1.0, {}), (B, 1.0, {"q": 1.0})),
        of((A, 1.0, {}), (B, 1.0, {"q": 1.0, "k": 2.0})),
        of((A, 1.0, {}), (B, 1.0, {"k": 2.0, "q": 1.0})),  # the last one that matches wins
        of((A, 1.0, {}), (B, 1.0, {}), base="other"),
        of((A, 1.0, {}), (B, 1.0, {}), base=None),
        of((A, 1.0, {}), (B, 1.0, {}), config=MergeConfig(dtype="fp16")),
        of((A, 1.0, {}), (B, 1.0, {}), config=MergeConfig(method="linear")),
        of((A, 1.0, {}), (B, 1.0, {}), config=MergeConfig(method="linear", rank=3)),
    }
    projected = MergeConfig(method="project_out")
    others |= {of((A, 1.0, {}), (B, 1.0, {}), config=projected), of((B, 1.0, {}), (A, 1.0, {}), config=projected)}
    monkeypatch.setattr(module, "CODE_VERSION", 1000)
    others.add(of((A, 1.0, {}), (B, 1.0, {})))
    assert len(others) == 12
    assert plain not in others
