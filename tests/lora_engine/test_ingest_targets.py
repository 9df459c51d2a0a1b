from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from lora_engine.errors import AdapterError
from lora_engine.ingest_targets import Targets

MODULES = st.sampled_from(
    [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.11.mlp.experts.3.up_proj",
        "transformer.h.1.attn.c_attn",
        "h.0.q_proj",
        "layers.1.q_proj",
        "model.decoder.blocks.1.layers.0.my_q_proj",
        "lm_head",
        "model.norm",
        "model.layers.2",
    ]
)
NAMES = st.sampled_from(["q_proj", "self_attn.q_proj", "proj", "lm_head", "h.0.q_proj", "up_proj", "2", "mlp", "norm"])
LISTS = st.lists(NAMES, min_size=1, max_size=3)
EXPRESSIONS = st.sampled_from([r".*\.q_proj", r"model\.layers\.(0|1)\..*", "lm_head", r".*[qu].*_proj", "h|q_proj"])


@settings(derandomize=True, max_examples=400)
@given(
    module=MODULES,
    targets=st.one_of(LISTS, EXPRESSIONS),
    excluded=st.one_of(st.none(), LISTS, EXPRESSIONS),
    layers=st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 3), max_size=2)),
    stacks=st.sampled_from([None, [], "layers", ["h"], ["blocks", "layers"], "decoder.blocks"]),
    saved=st.one_of(st.none(), st.lists(st.sampled_from(["norm", "lm_head", "mlp", "self_attn"]), max_size=2)),
)
def test_the_modules_are_those_that_peft_targets(
    module: str, targets: Any, excluded: Any, layers: Any, stacks: Any, saved: Any
) -> None:
    config = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": stacks,
        "modules_to_save": saved,
    }
    expected = bool(check_target_module_exists(SimpleNamespace(**config), module))
    assert Targets(config).include(module) == expected


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"target_modules": 3}, "target_modules must be names"),
        ({"exclude_modules": [1]}, "exclude_modules must be names"),
        ({"layers_to_transform": [True]}, "layers_to_transform must be numbers"),
        ({"layers_to_transform": "1"}, "layers_to_transform must be numbers"),
        ({"layers_pattern": "(a+)+"}, "layers_pattern must be names"),
        ({"target_modules": "(?=a)"}, "not a regular expression that is read"),
    ],
)
def test_what_peft_does_not_write_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        Targets(config)
