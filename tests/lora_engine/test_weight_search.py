"""What a search for weights finds, keeps, writes and refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine import adapter, weight_search_loss
from lora_engine.adapter import Adapter, LoraWeights
from lora_engine.adapter_header import digest
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec
from lora_engine.errors import AdapterError, DataError, SpecError
from lora_engine.product import LoraLinear
from lora_engine.weight_search import REPORT, search
from lora_engine.weight_search_config import SearchConfig, SearchSpec
from lora_engine.weight_search_data import split
from tests.lora_engine.jobs import conversation, train
from tests.lora_engine.weighted_stacks import dense_loss, random_adapter

SETTINGS = {"steps": 16, "eval_every": 4, "global_batch": 4, "learning_rate": 0.2, "sequence_length": 256}

Make = Callable[..., SearchSpec]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = [conversation(f"Question {number}?", f"Answer {number}.") for number in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture(scope="module")
def trained(base: BaseModel, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter that answers as the rows do."""
    output = tmp_path_factory.mktemp("trained")
    config = TrainingConfig(learning_rate=2e-2, epochs=4, global_batch=8, validation_fraction=0.0)
    spec = TrainSpec(
        base_model=str(base.folder), dataset=str(rows), output=str(output), base_model_name="tiny", threads=1,
        lora=LoraConfig(rank=2, alpha=2), training=config,
    )  # fmt: skip
    train(spec, base)
    return adapter.read(output / "adapter")


@pytest.fixture
def noise(base: BaseModel, tmp_path: Path) -> Path:
    return random_adapter(tmp_path / "noise", base, 5, rank=1, alpha=1)


@pytest.fixture
def make(base: BaseModel, rows: Path, tmp_path: Path) -> Make:
    def spec(*adapters: Path, output: str = "found", dataset: Path = rows, **settings: Any) -> SearchSpec:
        return SearchSpec(
            base_model=str(base.folder),
            dataset=str(dataset),
            adapters=[str(folder) for folder in adapters],
            output=str(tmp_path / output),
            threads=1,
            search=SearchConfig(**{**SETTINGS, **settings}),
        )

    return spec


def spoilt(trained: Adapter, noise: Path, folder: Path) -> Path:
    """The trained adapter plus the noise, as one adapter."""
    added = adapter.read(noise)
    weights = {
        name: LoraWeights(torch.cat([one.A, added.weights[name].A]), torch.cat([one.B, added.weights[name].B], 1))
        for name, one in trained.weights.items()
    }
    made = Adapter(weights, rank=3, alpha=3, base_model_name="tiny", base_digest=trained.base_digest)
    adapter.write(made, folder, lineage={})
    return folder


def flipped(trained: Adapter, folder: Path) -> Path:
    """The trained adapter with its second layer negated."""
    weights = {
        name: LoraWeights(one.A, -one.B if ".layers.1." in name else one.B) for name, one in trained.weights.items()
    }
    made = Adapter(weights, rank=2, alpha=2, base_model_name="tiny", base_digest=trained.base_digest)
    adapter.write(made, folder, lineage={})
    return folder


def row(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(item for item in report["table"] if item["name"] == name)


def test_it_finds_what_must_be_subtracted(
    base: BaseModel, trained: Adapter, noise: Path, make: Make, tmp_path: Path
) -> None:
    spec = make(spoilt(trained, noise, tmp_path / "spoilt"), noise)
    report = search(spec, base=base)
    assert report["kept"] == "found"
    assert row(report, "found")["weights"][digest(noise)] < -0.3
    others = [item for item in report["table"] if item["name"] != "found"]
    for split_name in ("selection_loss", "test_loss"):
        assert row(report, "found")[split_name] < min(item[split_name] for item in others)


def test_layers_have_weights_of_their_own(base: BaseModel, trained: Adapter, make: Make, tmp_path: Path) -> None:
    folder = flipped(trained, tmp_path / "flipped")
    whole = search(make(folder, output="whole"), base=base)
    layered = search(make(folder, output="layered", per="layer"), base=base)
    weights = row(layered, "found")["weights"][digest(folder)]
    assert list(weights) == ["model.layers.0", "model.layers.1"]
    assert weights["model.layers.0"] > 0 > weights["model.layers.1"]
    assert row(layered, "found")["test_loss"] < row(whole, "found")["test_loss"]
    assert_written(base, folder, tmp_path / "layered", layered)


def test_adapters_may_be_on_different_layers(base: BaseModel, noise: Path, make: Make, tmp_path: Path) -> None:
    lower = adapter.read(noise)
    lower.weights = {name: factors for name, factors in lower.weights.items() if ".layers.0." in name}
    adapter.write(lower, tmp_path / "lower", lineage={})
    report = search(make(noise, tmp_path / "lower", per="layer", steps=4), base=base)
    weights = row(report, "found")["weights"]
    first, second = (weights[digest(folder)] for folder in (noise, tmp_path / "lower"))
    found, before = adapter.read(tmp_path / "found"), adapter.read(noise)
    for name in before.weights:
        parts = [first[name[: len("model.layers.0")]], second["model.layers.0"] if ".layers.0." in name else 0.0]
        delta = adapter.delta(before, name)
        # They may cancel, so the rounding is that of the parts.
        assert (adapter.delta(found, name) - sum(parts) * delta).norm() < 1e-6 * sum(map(abs, parts)) * delta.norm()


def assert_written(base: BaseModel, source: Path, folder: Path, report: dict[str, Any]) -> None:
    """The stack in the folder is the source with the weights of the report, by layer."""
    weights = row(report, "found")["weights"][digest(source)]
    found, before = adapter.read(folder), adapter.read(source)
    for name in before.weights:
        weight = weights[name[: len("model.layers.0")]]
        wanted = weight * adapter.delta(before, name)
        assert (adapter.delta(found, name) - wanted).norm() < 1e-6 * wanted.norm()


def test_what_is_written_has_the_loss_of_the_table(
    base: BaseModel, trained: Adapter, noise: Path, make: Make, tmp_path: Path
) -> None:
    spec = make(spoilt(trained, noise, tmp_path / "spoilt"), noise)
    report = search(spec, base=base)
    splits = split(Path(spec.dataset), base, spec.search)
    for name in ("selection", "test"):
        loss = dense_loss(base, [Path(spec.output)], torch.ones(1, 1), ("",), getattr(splits, name))
        assert row(report, "found")[f"{name}_loss"] == pytest.approx(loss, rel=1e-5)
    written = json.loads((Path(spec.output) / REPORT).read_text())
    assert {name: report[name] for name in written} == written
    assert len(written["history"]) == SETTINGS["steps"]
    lineage = json.loads((Path(spec.output) / "lineage.json").read_text())
    assert lineage["weight_search"]["table"] == report["table"]
    assert report["rank"] == 4


def test_it_is_never_worse_than_what_it_began_with(
    base: BaseModel, trained: Adapter, noise: Path, make: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "trained"
    adapter.write(trained, folder, lineage={})
    report = search(make(folder, noise, learning_rate=1.0, steps=2, eval_every=1), base=base)
    assert report["kept"] == "single"
    assert report["best_single"] == digest(folder)
    kept, single = row(report, "found"), row(report, "single")
    assert kept["weights"] == single["weights"] == {digest(folder): 1.0, digest(noise): 0.0}
    assert kept["selection_loss"] == single["selection_loss"]
    assert max(item["selection_loss"] for item in report["history"]) > kept["selection_loss"]


def test_the_same_search_writes_the_same_bytes(base: BaseModel, noise: Path, make: Make, tmp_path: Path) -> None:
    search(make(noise, output="one", steps=3), base=base)
    search(make(noise, output="two", steps=3), base=base)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_progress_is_told_to_the_end(base: BaseModel, noise: Path, make: Make) -> None:
    told: list[tuple[int, int]] = []
    search(make(noise, steps=3), lambda done, total: told.append((done, total)), base)
    # Two beginnings and what was found, on two splits but for the latter, and the steps.
    assert told == [(done, 8) for done in range(1, 9)]


def test_stopped_half_way_nothing_remains(base: BaseModel, noise: Path, make: Make, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 4:
            raise Stopped

    before, threads = sorted(tmp_path.iterdir()), torch.get_num_threads()
    with pytest.raises(Stopped):
        search(make(noise), stop, base)
    assert sorted(tmp_path.iterdir()) == before
    assert torch.get_num_threads() == threads
    assert not any(isinstance(module, LoraLinear) for module in base.model.modules())


def test_a_step_that_runs_out_of_memory_is_made_in_smaller_pieces(
    base: BaseModel, noise: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = search(make(noise, output="one", steps=2), base=base)
    choose, failures = weight_search_loss.passes.choose, []

    def choose_failing(adapted: Any) -> Any:
        run = choose(adapted)
        gradients = run.gradients

        def failing(batch: Any, *rest: Any) -> float:
            # The first two are those of the planner.
            failures.append(batch)
            if len(failures) == 3:
                raise MemoryError
            return gradients(batch, *rest)

        monkeypatch.setattr(run, "gradients", failing)
        return run

    monkeypatch.setattr(weight_search_loss.passes, "choose", choose_failing)
    again = search(make(noise, output="two", steps=2), base=base)
    assert len(failures) > 4
    assert row(again, "found")["selection_loss"] == pytest.approx(row(report, "found")["selection_loss"], rel=1e-6)


def test_steps_that_are_not_finite_change_nothing(
    base: BaseModel, noise: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient(self: Any, weights: torch.Tensor, documents: Any) -> Any:
        return float("nan"), torch.full_like(weights, float("nan"))

    monkeypatch.setattr(weight_search_loss.StackLoss, "gradient", gradient)
    report = search(make(noise), base=base)
    assert report["kept"] == "single"
    assert report["skipped_steps"] == 3


def test_a_step_that_is_not_finite_is_left_out(
    base: BaseModel, noise: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient = weight_search_loss.StackLoss.gradient
    losses: list[float] = []

    def second_broken(self: Any, weights: torch.Tensor, documents: Any) -> Any:
        loss, found = gradient(self, weights, documents)
        losses.append(loss)
        return (loss, found * float("inf")) if len(losses) == 2 else (loss, found)

    monkeypatch.setattr(weight_search_loss.StackLoss, "gradient", second_broken)
    report = search(make(noise), base=base)
    assert report["kept"] == "found"
    assert report["skipped_steps"] == 1
    assert [item["loss"] for item in report["history"]] == losses
    assert len(losses) == SETTINGS["steps"]


def test_no_split_has_an_example_of_another(base: BaseModel, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    made = [conversation(f"Question {number % 20}?", f"Answer {number % 20}.") for number in range(60)]
    path.write_text("".join(json.dumps(item) + "\n" for item in made))
    splits = split(path, base, SearchConfig())
    parts = [
        {tuple(document.ids.tolist()) for document in part} for part in (splits.search, splits.selection, splits.test)
    ]
    assert [len(part) for part in parts] == [10, 5, 5]
    assert len(set.union(*parts)) == 20
    assert splits.duplicates == 40


def test_too_few_examples_are_refused(base: BaseModel, noise: Path, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text(json.dumps(conversation("Question?", "Answer.")) + "\n")
    with pytest.raises(DataError, match="1 different examples are too few"):
        search(make(noise, dataset=path), base=base)


def test_the_same_adapter_twice_is_refused(base: BaseModel, noise: Path, make: Make) -> None:
    with pytest.raises(SpecError, match=r"adapters\[1\]: the same adapter as adapters\[0\]"):
        search(make(noise, noise), base=base)


def test_adapters_of_another_base_are_refused(base: BaseModel, noise: Path, make: Make, tmp_path: Path) -> None:
    foreign = adapter.read(noise)
    foreign.base_digest = "another"
    adapter.write(foreign, tmp_path / "foreign", lineage={})
    with pytest.raises(AdapterError, match="of another base model"):
        search(make(tmp_path / "foreign"), base=base)
    with pytest.raises(AdapterError, match="different base models"):
        search(make(noise, tmp_path / "foreign"), base=base)


def test_shapes_that_the_base_does_not_have_are_refused(base: BaseModel, make: Make, tmp_path: Path) -> None:
    wide = LoraWeights(torch.ones(1, 40), torch.ones(32, 1))
    made = Adapter({"model.layers.0.self_attn.q_proj": wide}, rank=1, alpha=1)
    adapter.write(made, tmp_path / "wide", lineage={})
    with pytest.raises(AdapterError, match=r"wide: model.layers.0.self_attn.q_proj \(32 × 40\) is no linear layer"):
        search(make(tmp_path / "wide"), base=base)


def test_an_adapter_on_a_tied_head_is_refused(base: BaseModel, make: Make, tmp_path: Path) -> None:
    rows = len(base.model.get_output_embeddings().weight)
    made = Adapter({"lm_head": LoraWeights(torch.ones(1, 32), torch.ones(rows, 1))}, rank=1, alpha=1)
    adapter.write(made, tmp_path / "head", lineage={})
    with pytest.raises(AdapterError, match="head: lm_head shares its weight with the input embeddings"):
        search(make(tmp_path / "head"), base=base)


@pytest.mark.parametrize("settings", [{"quantization": "nf4"}, {"compute_dtype": "bf16"}])
def test_a_base_of_less_precision_is_loaded_and_searched_on(
    base: BaseModel, noise: Path, make: Make, settings: dict[str, Any]
) -> None:
    source = adapter.read(noise)
    source.base_digest = None  # the base is loaded anew, with its own digest
    adapter.write(source, noise, lineage={})
    report = search(make(noise, steps=2, **settings))
    plain = search(make(noise, output="plain", steps=2), base=base)
    losses = [row(item, "base model")["test_loss"] for item in (report, plain)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert row(report, "found")["selection_loss"] <= row(report, "single")["selection_loss"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"per": "module"}, "per"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"test_fraction": float("nan")}, "test_fraction"),
        ({"selection_fraction": 0.5, "test_fraction": 0.5}, "test_fraction"),
        ({"quantization": "int4"}, "quantization"),
    ],
)
def test_impossible_settings_name_their_field(values: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        SearchConfig(**values)
    assert caught.value.field == field
