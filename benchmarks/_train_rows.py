"""The rows that all contenders train on: the same tokens, the same targets, in the same order."""

import gzip
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lora_engine import base_model, data, lora

# Lengths of Alpaca in words: medians and spread (of the logarithm) of instruction, input and output.
_INSTRUCTION, _INPUT, _OUTPUT = (11, 0.35), (14, 0.8), (33, 1.0)
_WITH_INPUT = 0.4
_LONGEST_OUTPUT = 400


@dataclass(frozen=True, slots=True)
class Work:
    """One dataset as every contender needs it, on disk.

    Attributes:
        dataset: JSONL file, its rows in the order of the batches.
        batches: by step: documents with token ids and, for each, whether it is a target.
        initial: safetensors file with the first A of every adapted module.
    """

    name: str
    title: str
    dataset: Path
    batches: list[list[dict[str, list[int]]]]
    initial: Path
    sequence_length: int

    def tokens(self, step: int) -> int:
        return sum(len(document["ids"]) for document in self.batches[step])

    def targets(self, step: int) -> int:
        return sum(sum(document["trained"]) for document in self.batches[step])


def instructions(source: Path | None, tokenizer: Any, count: int, seed: int) -> list[dict[str, str]]:
    """Alpaca rows drawn from `source` (a JSON array, gzipped or not), or generated ones of like lengths."""
    chance = random.Random(seed)  # noqa: S311 (nothing secret)
    if source is not None:
        content = source.read_bytes()
        rows = json.loads(gzip.decompress(content) if source.suffix == ".gz" else content)
        usable = [row for row in rows if row["output"].strip()]
        return [
            {key: row.get(key, "") for key in ("instruction", "input", "output")}
            for row in chance.sample(usable, count)
        ]
    words = _Words(tokenizer, chance)
    return [
        {
            "instruction": words.text(_length(chance, *_INSTRUCTION)),
            "input": words.text(_length(chance, *_INPUT)) if chance.random() < _WITH_INPUT else "",
            "output": words.text(min(_length(chance, *_OUTPUT), _LONGEST_OUTPUT)),
        }
        for _ in range(count)
    ]


def plain(source: Path | None, tokenizer: Any, count: int, tokens: int, seed: int) -> list[dict[str, str]]:
    """Rows of at least `tokens` tokens, all of them targets, that begin each in its own way; no template."""
    if source is None:
        words = _Words(tokenizer, random.Random(seed))  # noqa: S311
        return [{"prompt": "", "completion": words.text(tokens + 8)} for _ in range(count)]
    texts = [row["output"] for row in instructions(source, tokenizer, 40 * count * max(1, tokens // 1024), seed)]
    rows, pieces, size = [], [], 0
    for text in texts:
        pieces.append(text)
        size += len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if size > tokens:
            rows.append({"prompt": "", "completion": "\n\n".join(pieces)})
            pieces, size = [], 0
        if len(rows) == count:
            return rows
    raise SystemExit(f"{source} has not enough text for {count} rows of {tokens} tokens")


def sorted_by_length(
    rows: Sequence[dict[str, str]], lengths: Sequence[int], size: int, seed: int
) -> list[dict[str, str]]:
    """Batches of `size` rows of like length, in random order."""
    order = sorted(range(len(rows)), key=lambda number: (lengths[number], number))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    random.Random(seed).shuffle(batches)  # noqa: S311
    return [rows[number] for batch in batches for number in batch]


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lengths_of(path: Path, tokenizer: Any, sequence_length: int) -> list[int]:
    """Tokens of each row of a JSONL file, as the engine reads it."""
    return [len(document) for document in data.read(path, tokenizer, sequence_length).documents]


def batches_of(path: Path, tokenizer: Any, sequence_length: int, size: int) -> list[list[dict[str, list[int]]]]:
    """The rows of a JSONL file in their order, `size` to a step, tokenised by the engine, for all contenders."""
    documents = [
        {"ids": document.ids.tolist(), "trained": document.trained.int().tolist()}
        for document in data.read(path, tokenizer, sequence_length).documents
    ]
    return [documents[start : start + size] for start in range(0, len(documents), size)]


def write_initial(path: Path, model: Path, rank: int, seed: int) -> Path:
    """The engine's own first A of every module, for the peers."""
    modules = [module for module in base_model.describe(model).modules if not module.head]
    save_file({module.name: lora.initial_factor(seed, module.name, rank, module.inputs) for module in modules}, path)
    return path


class _Words:
    """Text of words that the tokenizer knows, as frequent as Zipf's law has them: a little can be learnt."""

    def __init__(self, tokenizer: Any, chance: random.Random) -> None:
        texts = (tokenizer.convert_tokens_to_string([token]) for token in sorted(tokenizer.get_vocab()))
        words = [text[1:] for text in texts if text.startswith(" ") and text[1:].isascii() and text[1:].islower()]
        self._words = random.Random(0).sample([word for word in words if 2 <= len(word) <= 9 and word.isalpha()], 2000)  # noqa: S311
        self._weights = [1 / (rank + 3) for rank in range(len(self._words))]
        self._chance = chance

    def text(self, words: int) -> str:
        return " ".join(self._chance.choices(self._words, self._weights, k=words))


def _length(chance: random.Random, median: float, spread: float) -> int:
    return max(2, round(median * math.exp(chance.gauss(0, spread))))
