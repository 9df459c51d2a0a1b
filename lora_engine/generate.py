"""Text from a base model, alone or with an adapter, token by token.

Conversations are rendered by `chat` and adapters run in `lora.LoraLinear`: what is served is what was trained.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lora_engine import adapter as adapters
from lora_engine import chat
from lora_engine.adapter import Adapter
from lora_engine.base_model import BaseModel, context_length, linear_modules
from lora_engine.errors import AdapterError, SpecError
from lora_engine.examples import Message, PromptCompletion
from lora_engine.product import LoraLinear, Routing, Slot


def generate(
    base: BaseModel,
    prompt: str | Sequence[Message | Mapping[str, str]],
    *,
    adapter: Adapter | None = None,
    max_new_tokens: int = 256,
) -> str:
    """The greedy answer to a conversation, or the greedy continuation of a text, without special tokens.

    It ends at a stop token, after `max_new_tokens`, or where the model's context is full.

    Raises:
        AdapterError: the adapter is not of this base model.
        DataError: the chat template is missing or refuses the conversation.
        SpecError: the prompt leaves no room in the model's context.
    """
    ids = _prompt_ids(base.tokenizer, prompt)
    context = context_length(base.model)
    if context is not None and len(ids) >= context:
        raise SpecError(f"prompt: {len(ids)} tokens leave no room in a context of {context}", field="prompt")
    room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
    with attached(base, adapter) if adapter else contextlib.nullcontext():
        answer = list(greedy(base, ids, chat.stop_ids(base.tokenizer), room))
    text: str = base.tokenizer.decode(answer, skip_special_tokens=True)
    return text


@torch.no_grad()
def greedy(base: BaseModel, ids: Sequence[int], stop: set[int], max_new_tokens: int) -> Iterator[int]:
    """The most likely next token after `ids`, again and again, up to and without a token of `stop`."""
    cache: Any = None
    fed = list(ids)
    for _ in range(max_new_tokens):
        tokens = torch.tensor([fed], device=base.device)
        result = base.model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = int(result.logits[0, -1].argmax())
        if token in stop:
            return
        yield token
        cache, fed = result.past_key_values, [token]


@contextlib.contextmanager
def attached(base: BaseModel, adapter: Adapter) -> Iterator[None]:
    """Run the base model with these weights inside the context; it is as it was afterwards.

    Raises:
        AdapterError: a module that the base model does not have, or has in another shape.
    """
    if None not in (base.digest, adapter.base_digest) and base.digest != adapter.base_digest:
        raise AdapterError(f"the adapter was trained on another base model ({adapter.base_digest})")
    known = {module.name: (module.inputs, module.outputs) for module in linear_modules(base.model)}
    for name, weights in adapter.weights.items():
        if known.get(name) != (weights.A.shape[1], weights.B.shape[0]):
            raise AdapterError(f"{name}: not a linear layer of this shape in the base model")
    plain = {name: base.model.get_submodule(name) for name in adapter.weights}
    try:
        for index, name in enumerate(plain):
            base.model.set_submodule(name, _layer(base, adapter, name, index))
        yield
    finally:
        for name, module in plain.items():
            base.model.set_submodule(name, module)


def _layer(base: BaseModel, adapter: Adapter, name: str, index: int) -> LoraLinear:
    weights = adapter.weights[name]
    A, B = (factor.to(base.device, base.compute_dtype) for factor in (weights.A, weights.B))
    layer = LoraLinear(base.model.get_submodule(name), Routing(), index)
    layer.slots[0] = Slot(A, B, adapters.scaling(adapter, name), dropout=0.0, a=A, b=B)
    return layer


def _prompt_ids(tokenizer: Any, prompt: str | Sequence[Message | Mapping[str, str]]) -> list[int]:
    if not isinstance(prompt, str):
        return chat.prompt_ids(tokenizer, prompt)
    tokens = chat.tokenize(tokenizer, PromptCompletion(prompt, ""))
    return [token for token, trained in zip(tokens.ids, tokens.trained, strict=True) if not trained]
