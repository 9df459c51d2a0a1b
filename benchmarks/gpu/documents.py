"""What is trained on: random tokens, of one length or of Alpaca's lengths."""

import gzip
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.shapes import ALPACA
from lora_engine.data import Dataset, Document

# Without a tokenizer: characters of English in a token of Llama's, and tokens of Alpaca's template.
_CHARACTERS, _TEMPLATE = 4.0, 34
# Without the data: medians and spreads (of the logarithm) of prompt and answer, in tokens.
_PROMPT, _ANSWER = (58, 0.35), (48, 1.0)
_MOST = 2048
_TEMPLATE_TEXT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)

Lengths = list[tuple[int, int]]


def alpaca_lengths(source: Path | None, tokenizer: Any, count: int) -> tuple[Lengths, str]:
    """(tokens of prompt and answer) of the examples in random order, and how they were found."""
    chance = random.Random(0)  # noqa: S311 (nothing secret)
    if source is None:
        return [(_drawn(chance, *_PROMPT), _drawn(chance, *_ANSWER)) for _ in range(count)], "drawn, as Alpaca's"
    content = source.read_bytes()
    rows = json.loads(gzip.decompress(content) if source.suffix == ".gz" else content)
    rows = [row for row in rows if row["output"].strip()]
    chance.shuffle(rows)
    if tokenizer is None:
        found = [
            (_TEMPLATE + _tokens(row["instruction"]) + _tokens(row["input"]), _tokens(row["output"]) + 1)
            for row in rows[:count]
        ]
        return [_cut(pair) for pair in found], "of the data, four characters to a token"
    pairs = [
        tuple(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        for texts in ((_TEMPLATE_TEXT.format(**row), row["output"]) for row in rows[:count])
    ]
    return [_cut((prompt, answer + 1)) for prompt, answer in pairs], "of the data, by the given tokenizer"


def documents(length: int | str, count: int, vocabulary: int, lengths: Lengths, seed: int = 0) -> list[Document]:
    """`count` documents of `length` tokens, all of them targets; or with Alpaca's prompts and answers."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [lengths[number % len(lengths)] for number in range(count)] if length == ALPACA else [(1, 0)] * count
    found = []
    for number, (prompt, answer) in enumerate(pairs):
        size = prompt + answer if length == ALPACA else int(length)
        ids = torch.randint(3, vocabulary, (size,), generator=generator, dtype=torch.int32)
        found.append(Document(number, ids, torch.arange(size) >= prompt))
    return found


def dataset(found: Sequence[Document]) -> Dataset:
    return Dataset(tuple(found), digest="random", truncated=0, dropped=0)


def batches(found: Sequence[Document], size: int) -> list[list[dict[str, list[int]]]]:
    """As the contenders of `benchmarks/train.py` are given them."""
    plain = [{"ids": item.ids.tolist(), "trained": item.trained.int().tolist()} for item in found]
    return [plain[start : start + size] for start in range(0, len(plain), size)]


def examples_a_step(length: int | str, tokens: int, lengths: Lengths) -> int:
    """As many as make about `tokens`."""
    mean = sum(map(sum, lengths)) / len(lengths) if length == ALPACA else int(length)
    return max(1, round(tokens / mean))


def _drawn(chance: random.Random, median: float, spread: float) -> int:
    return min(_MOST // 2, max(2, round(median * math.exp(chance.gauss(0, spread)))))


def _tokens(text: str) -> int:
    return math.ceil(len(text) / _CHARACTERS)


def _cut(pair: tuple[int, int]) -> tuple[int, int]:
    prompt = min(pair[0], _MOST - 1)
    return prompt, min(pair[1], _MOST - prompt)
