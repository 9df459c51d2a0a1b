"""Whether what was written computes what was trained: log-probabilities on a fixed set of prompts, from disk.

The reference is the base model with the factored deltas beside it, on the weights that the adapters were trained
against; the other side is what an export left on disk, read back. Both are computed in fp32, by the same forward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_engine import chat
from lora_engine.chat import Tokens
from lora_engine.errors import AdapterError, DataError
from lora_engine.examples import Conversation, Instruction, Message, PromptCompletion

# Question and answer: prose, other languages, figures, code.
PROMPTS = (
    ("What is the capital of France?", "The capital of France is Paris, on the river Seine."),
    ("Übersetze ins Deutsche: Good morning, my friend!", "Guten Morgen, mein Freund!"),
    ("Compute 17 + 26.", "17 + 26 = 43."),
    ("Write a Python function that doubles a number.", "def double(x):\n    return 2 * x"),
)
_PREDICTIONS = 12  # of each answer, from its beginning
_LENGTH = 96  # tokens of a prompt with its answer; a system prompt is cut off from the front


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, and at which of them the model predicts a token of the answer."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Parity:
    """Over all predictions: the gap of a log-probability (nats) at the answer's own token and at the most likely one.

    Attributes:
        kl: mean Kullback–Leibler divergence of the reference from what was written, in nats.
        greedy_agreement: share of the predictions with the same most likely token.
    """

    predictions: int
    max_gap: float
    mean_gap: float
    kl: float
    greedy_agreement: float


def texts(tokenizer: Any) -> list[Text]:
    """The prompts as the base model's chat template writes them (without one, in Alpaca's form)."""
    found = []
    for question, answer in PROMPTS:
        tokens = _tokens(tokenizer, question, answer)
        first = tokens.trained.index(True)
        stop = min(len(tokens.ids), first + _PREDICTIONS)
        start = max(0, stop - _LENGTH)
        found.append(Text(tuple(tokens.ids[start:stop]), tuple(range(first - 1 - start, stop - 1 - start))))
    return found


@torch.no_grad()
def log_probabilities(model: Any, prompts: Sequence[Text]) -> Tensor:
    """(predictions, vocabulary) of a `streamed` model, fp32."""
    length = max(len(text.ids) for text in prompts)
    # Padded on the right, where attention does not look.
    ids = torch.tensor([[*text.ids, *[text.ids[0]] * (length - len(text.ids))] for text in prompts])
    places = [(row, position) for row, text in enumerate(prompts) for position in text.positions]
    rows, positions = (torch.tensor(column) for column in zip(*places, strict=True))
    head = model.get_output_embeddings()
    head.positions = (rows, positions)
    return model(ids, use_cache=False).logits.log_softmax(dim=-1)  # type: ignore[no-any-return]


def compare(reference: Tensor, written: Tensor, prompts: Sequence[Text]) -> Parity:
    """Of two results of `log_probabilities`.

    Raises:
        AdapterError: numbers that are not finite.
    """
    vocabulary = min(reference.shape[1], written.shape[1])
    p, q = reference[:, :vocabulary], written[:, :vocabulary]
    if not (bool(torch.isfinite(p).all()) and bool(torch.isfinite(q).all())):
        raise AdapterError("parity: log-probabilities are not finite; the weights have left the range of their type")
    own = torch.tensor([text.ids[position + 1] for text in prompts for position in text.positions])
    likely = p.argmax(dim=1)
    looked_at = torch.stack([own, likely], dim=1)
    gaps = (p.gather(1, looked_at) - q.gather(1, looked_at)).abs()
    divergence = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) / len(p)
    agreement = (likely == q.argmax(dim=1)).double().mean()
    return Parity(len(p), gaps.max().item(), gaps.mean().item(), max(divergence.item(), 0.0), agreement.item())


def check(parity: Parity, limit: float, advice: str) -> None:
    """Raises AdapterError where the largest gap is beyond `limit`."""
    if not parity.max_gap <= limit:
        raise AdapterError(
            f"parity: what was written differs from base model and adapters as trained by up to {parity.max_gap:.3g} in"
            f" log-probability (mean {parity.mean_gap:.3g}; {parity.greedy_agreement:.1%} of the most likely tokens are"
            f" the same); at most {limit:g} is allowed: {advice}"
        )


def _tokens(tokenizer: Any, question: str, answer: str) -> Tokens:
    """By the first way that the tokenizer and its template allow."""
    if tokenizer.chat_template:
        try:
            turns = (Message("user", question, False), Message("assistant", answer, True))
            return chat.tokenize(tokenizer, Conversation(turns))
        except DataError:  # a template that refuses this; any text will do
            return chat.tokenize(tokenizer, PromptCompletion(f"{question}\n", answer))
    return chat.tokenize(tokenizer, Instruction(question, "", answer))
