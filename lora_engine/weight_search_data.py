"""Examples of a weight search, parted three ways so that no split has an example of another."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_engine import data
from lora_engine.base_model import BaseModel, context_length
from lora_engine.data import Dataset, Document
from lora_engine.errors import DataError
from lora_engine.weight_search_config import SearchConfig


@dataclass(frozen=True, slots=True)
class Splits:
    """The different examples of `dataset`; `duplicates` more hold the same tokens and targets as one of them."""

    dataset: Dataset
    search: Sequence[Document]
    selection: Sequence[Document]
    test: Sequence[Document]
    duplicates: int


def split(path: Path, base: BaseModel, config: SearchConfig) -> Splits:
    """A function of the content of the file, the fractions and the seed.

    Raises:
        DataError: a row that cannot be used, or too few examples for a split to have one.
    """
    length = min(config.sequence_length, context_length(base.model) or config.sequence_length)
    dataset = data.read_once(path, base.tokenizer, length, base.datasets)
    data.check_vocabulary(dataset.documents, len(base.model.get_input_embeddings().weight))
    different = replace(dataset, documents=tuple(_different(dataset.documents)))
    rest, test = data.split(different, config.test_fraction, config.seed)
    fraction = config.selection_fraction / (1 - config.test_fraction)
    search, selection = data.split(replace(different, documents=tuple(rest)), fraction, config.seed)
    if not (search and selection and test):
        raise DataError(
            f"{len(different.documents)} different examples are too few for a split to search on, one to select on and "
            "one to test on; add examples, or raise selection_fraction and test_fraction"
        )
    return Splits(different, search, selection, test, len(dataset.documents) - len(different.documents))


def _different(documents: Sequence[Document]) -> list[Document]:
    found: dict[tuple[bytes, bytes], Document] = {}
    for document in documents:
        found.setdefault((document.ids.numpy().tobytes(), document.trained.numpy().tobytes()), document)
    return list(found.values())
