import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine import data
from lora_engine.data import Dataset, Document
from lora_engine.errors import DataError
from tests.tiny_model import make_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def document(number: int, length: int, trained: int = 2) -> Document:
    marks = torch.zeros(length, dtype=torch.bool)
    marks[length - trained :] = True
    return Document(number, torch.arange(length, dtype=torch.int32) + 100 * number, marks)


def dataset(count: int) -> Dataset:
    return Dataset(tuple(document(index, 5) for index in range(count)), "digest", 0, 0)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_long_examples_are_cut_and_those_without_a_target_dropped(tokenizer: Any, tmp_path: Path) -> None:
    rows = write(
        tmp_path / "rows",
        {"prompt": "a", "completion": "b"},
        {"prompt": "a" * 40, "completion": "b"},
        {"prompt": "a", "completion": "b " * 40},
    )
    found = data.read(rows, tokenizer, 10)
    assert (len(found.documents), found.truncated, found.dropped) == (2, 2, 1)
    assert [item.number for item in found.documents] == [0, 2]
    assert len(found.documents[1]) == 10
    assert found.documents[0].ids.tolist() == tokenizer("ab<|end|>")["input_ids"]
    assert found.documents[0].trained.tolist() == [False, False, True, True]


def test_a_dataset_without_targets_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows", {"prompt": "a" * 40, "completion": "b"})
    with pytest.raises(DataError, match="no token to train in any of 1 examples"):
        data.read(rows, tokenizer, 10)
    with pytest.raises(DataError, match="no token to train in any of 0 examples"):
        data.read(write(tmp_path / "empty"), tokenizer, 10)


def test_a_wrong_row_is_named_by_its_line(tokenizer: Any, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows", {"prompt": "a", "completion": "b"}, {"prompt": 1, "completion": "b"})
    with pytest.raises(DataError, match="line 2, prompt") as caught:
        data.read(rows, tokenizer, 10)
    assert caught.value.facts == {"line": 2, "path": "prompt"}
    with pytest.raises(DataError, match="cannot be read"):
        data.read(tmp_path / "nothing", tokenizer, 10)


def test_a_token_without_an_embedding_is_refused() -> None:
    data.check_vocabulary([document(0, 5)], 5)
    with pytest.raises(DataError, match="example 1 holds token 4"):
        data.check_vocabulary([document(0, 5)], 4)


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(100, 0.05, 5), (10, 0.05, 1), (9, 0.05, 0), (9, 0.5, 4), (1, 0.5, 0), (50, 0, 0)]
)
def test_the_share_that_is_held_out(count: int, fraction: float, held: int) -> None:
    training, validation = data.split(dataset(count), fraction, seed=0)
    assert len(validation) == held
    assert sorted(item.number for item in (*training, *validation)) == list(range(count))


def test_the_split_is_a_function_of_content_and_seed() -> None:
    def chosen(digest: str, seed: int) -> list[int]:
        whole = Dataset(dataset(200).documents, digest, 0, 0)
        return [item.number for item in data.split(whole, 0.1, seed)[1]]

    assert chosen("a", 0) == chosen("a", 0)
    assert len({tuple(chosen(digest, seed)) for digest in "ab" for seed in (0, 1)}) == 4


def test_the_order_of_an_epoch_never_changes() -> None:
    """Written down: another order would make old checkpoints resume into another training."""
    first = [5, 2, 3, 4, 6, 0, 1, 7]
    assert data.epoch_order("digest", 7, 0, 8) == first
    assert sorted(data.epoch_order("digest", 7, 1, 8)) == list(range(8))
    assert data.epoch_order("digest", 7, 1, 8) != first


def test_micro_batches_pad_on_the_right_and_keep_to_the_budget() -> None:
    documents = [document(number, length) for number, length in enumerate((9, 3, 4, 30, 4))]
    batches = list(data.micro_batches(documents, 12, CPU))
    assert [batch.ids.shape for batch in batches] == [(3, 4), (1, 9), (1, 30)]
    first = batches[0]
    assert first.examples.tolist() == [1, 2, 4]
    assert first.ids.tolist() == [[100, 101, 102, 0], [200, 201, 202, 203], [400, 401, 402, 403]]
    assert first.predicts.tolist() == [
        [True, True, False, False],
        [False, True, True, False],
        [False, True, True, False],
    ]
    assert first.targets.tolist() == [101, 102, 202, 203, 402, 403]


def test_every_document_is_in_exactly_one_micro_batch() -> None:
    documents = [document(number, 3 + number % 11) for number in range(40)]
    batches = list(data.micro_batches(documents, 32, CPU))
    assert sorted(number for batch in batches for number in batch.examples.tolist()) == list(range(40))
    assert all(batch.ids.numel() <= 32 for batch in batches)
    assert all(int(batch.predicts.sum()) == len(batch.targets) == 2 * len(batch.examples) for batch in batches)


def test_a_row_that_the_template_refuses_is_named_by_its_line(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = write(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"}, row)
    with pytest.raises(DataError, match="line 2: the base model's chat template refuses") as refused:
        data.read(path, tokenizer, 64)
    assert refused.value.facts["line"] == 2
