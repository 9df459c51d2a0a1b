"""Datasets as the training loop sees them: tokenised examples, a held-out split, and the order of every epoch.

The split and the order are pure functions of (content of the dataset, seed, epoch), so a checkpoint needs no more than
the number of steps done.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine import chat
from lora_engine.base_files import sha256_file
from lora_engine.errors import DataError
from lora_engine.examples import read_examples

_KEPT = 2  # tokenised datasets, with a base model


@dataclass(frozen=True, slots=True)
class Document:
    """One example: token ids, int32 (tokens), which of them are targets, bool (tokens), its number in the dataset."""

    number: int
    ids: Tensor
    trained: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        return int(self.trained.sum())


@dataclass(frozen=True, slots=True)
class Dataset:
    """All usable examples of one file.

    Attributes:
        digest: SHA-256 of the file.
        truncated: examples that were cut at the sequence length.
        dropped: examples without any target left.
    """

    documents: tuple[Document, ...]
    digest: str
    truncated: int
    dropped: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Documents side by side, padded on the right to the longest.

    Attributes:
        ids: int64 (documents, length).
        predicts: bool (documents, length); the token after this position is a target.
        targets: int64 (targets), in the order of `predicts`.
        examples: int64 (documents), numbers of the documents in the dataset.
        tokens: without padding.
    """

    ids: Tensor
    predicts: Tensor
    targets: Tensor
    examples: Tensor
    tokens: int

    @property
    def rows(self) -> int:
        """That are computed, with padding."""
        return self.ids.numel()

    @property
    def trained_tokens(self) -> int:
        return len(self.targets)


def read(path: Path, tokenizer: Any, sequence_length: int) -> Dataset:
    """Tokenise a JSONL file.

    Raises:
        DataError: a row that cannot be used, or no target in the whole file.
    """
    documents: list[Document] = []
    truncated = dropped = 0
    try:
        with path.open("rb") as stream:
            for number, (line, example) in enumerate(read_examples(stream)):
                try:
                    tokens = chat.tokenize(tokenizer, example)
                except DataError as error:
                    raise DataError(f"line {line}: {error.message}", line=line) from error
                truncated += len(tokens.ids) > sequence_length
                trained = torch.tensor(tokens.trained[:sequence_length], dtype=torch.bool)
                if trained.any():
                    ids = torch.tensor(tokens.ids[:sequence_length], dtype=torch.int32)
                    documents.append(Document(number, ids, trained))
                else:
                    dropped += 1
    except OSError as error:
        raise DataError(f"the dataset cannot be read: {error.strerror}") from error
    if not documents:
        raise DataError(
            f"no token to train in any of {dropped} examples; are the answers empty, or beyond sequence_length?"
        )
    return Dataset(tuple(documents), sha256_file(path), truncated, dropped)


def read_once(path: Path, tokenizer: Any, sequence_length: int, kept: dict[tuple[str, int], Dataset]) -> Dataset:
    """As `read`, but what `kept` holds of the same content is taken from there; the last two stay in it.

    `kept` belongs to one tokenizer: another job, or another attempt, on the same rows begins at once.
    """
    if not path.is_file():
        return read(path, tokenizer, sequence_length)  # which says so
    key = (sha256_file(path), sequence_length)
    found = kept.pop(key, None) or read(path, tokenizer, sequence_length)
    kept[key] = found  # the newest last
    while len(kept) > _KEPT:
        del kept[next(iter(kept))]
    return found


def check_vocabulary(documents: Sequence[Document], size: int) -> None:
    """Refuse tokens that the tokenizer knows and a base model of `size` embeddings does not.

    Raises:
        DataError: names the example and the token.
    """
    for document in documents:
        token = int(document.ids.max())
        if token >= size:
            raise DataError(f"example {document.number + 1} holds token {token}; the base model has {size} embeddings")


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[list[Document], list[Document]]:
    """(training, validation): the share `fraction` is held out, at least one example of ten or more."""
    count = len(dataset.documents)
    held = int(count * fraction)
    if fraction and count >= 10:
        held = max(held, 1)
    chosen = set(_random(dataset.digest, seed, "split").sample(range(count), held))
    training = [document for index, document in enumerate(dataset.documents) if index not in chosen]
    return training, [dataset.documents[index] for index in sorted(chosen)]


def epoch_order(digest: str, seed: int, epoch: int, count: int) -> list[int]:
    """A permutation of 0 … count - 1."""
    order = list(range(count))
    _random(digest, seed, epoch).shuffle(order)
    return order


def micro_batches(documents: Sequence[Document], max_tokens: int, device: torch.device) -> Iterator[MicroBatch]:
    """Group documents of like length; documents × longest stays within `max_tokens`, but for a single document."""
    group: list[Document] = []
    for document in sorted(documents, key=lambda item: (len(item), item.number)):
        if group and (len(group) + 1) * len(document) > max_tokens:
            yield _padded(group, device)
            group = []
        group.append(document)
    if group:
        yield _padded(group, device)


def _padded(documents: Sequence[Document], device: torch.device) -> MicroBatch:
    length = max(len(document) for document in documents)
    ids = torch.zeros(len(documents), length, dtype=torch.long)
    predicts = torch.zeros(len(documents), length, dtype=torch.bool)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = document.ids
        predicts[row, : len(document) - 1] = document.trained[1:]
    targets = torch.cat([document.ids[document.trained] for document in documents]).long()
    numbers = torch.tensor([document.number for document in documents])
    tokens = sum(len(document) for document in documents)
    return MicroBatch(ids.to(device), predicts.to(device), targets.to(device), numbers.to(device), tokens)


def _random(digest: str, seed: int, purpose: object) -> random.Random:
    return random.Random(hashlib.sha256(f"{digest}/{seed}/{purpose}".encode()).digest())  # noqa: S311 (nothing secret)
