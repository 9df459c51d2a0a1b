import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_engine.base_model import describe, linear_modules
from lora_engine.config import LoraConfig
from lora_engine.errors import SpecError
from lora_engine.target_modules import ROLES, Module, last_names, shape, shared_input, targets
from tests.tiny_model import make_llama_config
from tests.zoo import FAMILIES

SEVEN_B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32}  # fmt: skip
EVERY_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
LLAMA = {
    "query": ["self_attn.q_proj"],
    "key": ["self_attn.k_proj"],
    "value": ["self_attn.v_proj"],
    "projection": ["self_attn.o_proj"],
    "mlp": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
    "head": [],
}
PHI3 = {"query key value": ["self_attn.qkv_proj"], "mlp": ["mlp.gate_up_proj", "mlp.down_proj"]}
GPT2 = {"query key value": ["attn.c_attn"], "projection": ["attn.c_proj"], "mlp": ["mlp.c_fc", "mlp.c_proj"]}


def modules_of(folder: Path) -> tuple[Module, ...]:
    with torch.device("meta"):
        return linear_modules(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Module, ...]]:
    return {name: modules_of(make(tmp_path_factory.mktemp(name))) for name, make in FAMILIES.items()}


@pytest.fixture(scope="module")
def llama(zoo: dict[str, tuple[Module, ...]]) -> tuple[Module, ...]:
    return zoo["llama"]


def names(modules: Sequence[Module], entries: Any, **config: Any) -> set[str]:
    return {module.name for module in targets(modules, LoraConfig(target_modules=entries, **config))}


@pytest.mark.parametrize(
    "subset", [subset for count in range(7) for subset in itertools.combinations(ROLES, count)], ids=",".join
)
def test_every_subset_of_the_six_roles(subset: tuple[str, ...], llama: tuple[Module, ...]) -> None:
    if not subset:
        with pytest.raises(SpecError, match="between 1 and"):
            names(llama, subset)
        return
    expected = {f"model.layers.{layer}.{name}" for layer in (0, 1) for role in subset for name in LLAMA[role]}
    assert names(llama, subset) == expected | ({"lm_head"} if "head" in subset else set())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_roles_name_every_linear_layer_of_every_family_once(
    family: str, zoo: dict[str, tuple[Module, ...]]
) -> None:
    modules = zoo[family]
    # Mixtral's experts are no linear layers but one parameter each.
    groups = [ROLES[:3], *((role,) for role in ROLES[3:] if (family, role) != ("mixtral", "mlp"))]
    found = [name for group in groups for name in names(modules, group)]
    assert sorted(found) == sorted(module.name for module in modules)


@pytest.mark.parametrize(("family", "expected"), [("phi3", PHI3), ("gpt2", GPT2)], ids=["phi3", "gpt2"])
def test_fused_layers_have_the_roles_of_their_parts(
    family: str, expected: dict[str, list[str]], zoo: dict[str, tuple[Module, ...]]
) -> None:
    for group, ends in expected.items():
        found = names(zoo[family], group.split())
        assert found == {module.name for module in zoo[family] if module.name.endswith(tuple(ends))}
        assert len(found) == 2 * len(ends)


@pytest.mark.parametrize("entries", [["query"], ["key", "mlp"], ["query", "value", "head"]])
@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_a_fused_layer_is_adapted_whole_or_not_at_all(
    family: str, entries: list[str], zoo: dict[str, tuple[Module, ...]]
) -> None:
    with pytest.raises(
        SpecError, match=r"query, key and value are one layer in this base model \(.*name .* too"
    ) as caught:
        names(zoo[family], entries)
    assert caught.value.field == "lora.target_modules"


def test_names_patterns_and_all_linear(llama: tuple[Module, ...]) -> None:
    def both(*ends: str) -> set[str]:
        return {f"model.layers.{layer}.{end}" for layer in (0, 1) for end in ends}

    assert names(llama, ["v_proj"]) == both("self_attn.v_proj")
    assert names(llama, ["layers.1.mlp.up_proj"]) == {"model.layers.1.mlp.up_proj"}
    assert names(llama, ["model.layers.[0-7].*.q_proj"]) == both("self_attn.q_proj")
    assert names(llama, ["model.layers.[!0].*.q_proj"]) == {"model.layers.1.self_attn.q_proj"}
    assert names(llama, ["layers.*.mlp.*"]) == both(*LLAMA["mlp"])
    assert names(llama, ["?_proj"]) == both(*(f"self_attn.{name}" for name in EVERY_LINEAR[:4]))
    assert names(llama, ["mlp.*", "lm_head"]) == both(*LLAMA["mlp"]) | {"lm_head"}
    assert len(names(llama, "all-linear")) == 14
    assert "lm_head" not in names(llama, "all-linear")
    # The end of a name begins after a dot.
    with pytest.raises(SpecError):
        names(llama, ["proj"])


def test_a_pattern_that_is_slow_as_a_regular_expression_is_not() -> None:
    modules = [Module("a" * 200 + f".{number}", 1, 1, False) for number in range(200)]
    with pytest.raises(SpecError, match="no linear layer"):
        names(modules, ["*a" * 99 + "*b"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("proj", r"no linear layer is called 'proj'; there are down_proj, .*q_proj"),
        ("embed_tokens", r"'embed_tokens' is an embedding, and only linear layers are adapted; there are"),
        ("model.embed_tokens", "is an embedding"),
        ("[0-7", r"no linear layer is called '\[0-7'"),
    ],
)
def test_a_name_without_a_module_is_refused_with_the_known_ones(
    entry: str, message: str, llama: tuple[Module, ...]
) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        names(llama, ["q_proj", entry])
    assert caught.value.field == "lora.target_modules"


def test_a_role_that_the_model_does_not_have_is_refused(zoo: dict[str, tuple[Module, ...]]) -> None:
    with pytest.raises(SpecError, match="no linear layer has the role mlp alone; there are k_proj"):
        names(zoo["mixtral"], ["mlp"])
    assert names(zoo["gpt2"], ["query", "key", "value"]) == {f"transformer.h.{layer}.attn.c_attn" for layer in (0, 1)}
    with pytest.raises(SpecError, match="'wte' is an embedding"):
        names(zoo["gpt2"], ["wte"])


def test_of_several_entries_of_a_pattern_the_last_one_counts(llama: tuple[Module, ...]) -> None:
    config = LoraConfig(
        rank=8,
        rank_pattern={"layers.0.*": 4, "mlp": 16, "up_proj": 2},
        alpha_pattern={"query": 5, "layers.0.self_attn.q_proj": 7},
        learning_rate_pattern={"layers.1.*": 1e-3},
    )
    found = {module.name.removeprefix("model.layers."): shape(config, module) for module in targets(llama, config)}
    ranks = {name: found[name].rank for name in ("0.self_attn.k_proj", "1.self_attn.k_proj", "0.mlp.down_proj",
                                                 "0.mlp.up_proj")}  # fmt: skip
    assert list(ranks.values()) == [4, 8, 16, 2]
    # alpha follows a module's own rank where nothing says otherwise.
    alphas = [found[name].alpha for name in (*ranks, "0.self_attn.q_proj", "1.self_attn.q_proj")]
    assert alphas == [8, 16, 32, 4, 7, 5]
    assert found["0.self_attn.q_proj"].scaling == 7 / 4
    assert (found["0.mlp.up_proj"].learning_rate, found["1.mlp.up_proj"].learning_rate) == (None, 1e-3)


def test_an_alpha_that_is_given_holds_for_all_ranks(llama: tuple[Module, ...]) -> None:
    config = LoraConfig(rank=8, alpha=8, rank_pattern={"query": 4}, use_rslora=True)
    query, key = (next(module for module in llama if module.name.endswith(end)) for end in ("q_proj", "k_proj"))
    assert (shape(config, query).alpha, shape(config, query).scaling) == (8, 4)
    assert shape(config, key).scaling == pytest.approx(8**0.5)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern", "learning_rate_pattern"])
@pytest.mark.parametrize("entry", ["k_proj", "mlp", "nothing", "lm_head"])
def test_an_entry_of_a_pattern_must_name_an_adapted_module(pattern: str, entry: str, llama: tuple[Module, ...]) -> None:
    with pytest.raises(SpecError, match=f"no adapted layer .*{entry}") as caught:
        names(llama, ["q_proj"], **{pattern: {"query": 1, entry: 1}})
    assert caught.value.field == f"lora.{pattern}"


def test_layers_that_read_the_same_input_are_known(zoo: dict[str, tuple[Module, ...]]) -> None:
    def groups(family: str) -> list[list[str]]:
        modules = sorted(zoo[family], key=shared_input)
        shared = [[module.name for module in group] for _, group in itertools.groupby(modules, key=shared_input)]
        return [sorted(group) for group in shared if len(group) > 1]

    expected = [
        [f"model.layers.{layer}.{name}" for name in group]
        for layer in (0, 1)
        for group in (["mlp.gate_proj", "mlp.up_proj"], [f"self_attn.{letter}_proj" for letter in "kqv"])
    ]
    assert groups("llama") == expected
    assert groups("phi3") == groups("gpt2") == []


def test_last_names_stand_for_modules_only_where_they_name_no_other(llama: tuple[Module, ...]) -> None:
    both = targets(llama, LoraConfig(target_modules=["q_proj"]))
    assert last_names(llama, both) == ("q_proj",)
    assert last_names(llama, both[:1]) == ("model.layers.0.self_attn.q_proj",)


@pytest.mark.parametrize(
    ("entries", "rank", "expected"),
    [
        (["q_proj", "v_proj"], 8, 4_194_304),
        (["query", "value"], 8, 4_194_304),
        (EVERY_LINEAR, 8, 20_277_248),
        (ROLES, 256, 648_871_936),
    ],
)
def test_parameters_of_llama_2_7b(entries: Sequence[str], rank: int, expected: int, tmp_path: Path) -> None:
    description = describe(make_llama_config(tmp_path, **SEVEN_B))
    assert description.parameters == 6_738_415_616
    config = LoraConfig(rank=rank, target_modules=entries)
    chosen = targets(description.modules, config)
    assert sum(shape(config, module).rank * (module.inputs + module.outputs) for module in chosen) == expected
