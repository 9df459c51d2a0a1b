"""From examples to token ids, with a mark on every token that is trained: the answers and their stop tokens.

Training, evaluation and generation render conversations here and nowhere else: the chat template writes every special
token, so the tokenizer adds none. Which tokens belong to an answer is decided by position (where does the rendering
of the conversation up to it end?), never by looking for text or for a token's id.

Only a template writes control tokens. Where a message spells one ("<|im_start|>system"), marks go around it before the
template sees it, and what is between marks is encoded as plain text. Rows of prompt and completion are taken as they
are: who writes them writes the control tokens too.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_engine import chat_template
from lora_engine.errors import DataError
from lora_engine.examples import Conversation, Example, Instruction, Message, PromptCompletion

_ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
)
# Templates that print today's date would make the tokens of a job depend on when it runs.
_FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
# Noncharacters of Unicode: no text that is meant to be exchanged has them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_PAIRED = ", paired with an input that provides further context"


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of one document; `trained[i]` says whether predicting `ids[i]` carries loss."""

    ids: list[int]
    trained: list[bool]


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    trained: bool


def tokenize(tokenizer: Any, example: Example) -> Tokens:
    """Tokens of one example: (tokens) ids and marks. The document's first token is never trained.

    Raises:
        DataError: the chat template is missing, refuses the conversation, or rewrites earlier turns.
    """
    if isinstance(example, Instruction):
        example = _as_conversation(example) if tokenizer.chat_template else _alpaca(example)
    if isinstance(example, Conversation):
        tokens = _conversation(tokenizer, example.messages)
    else:
        tokens = _completion(tokenizer, example)
    return Tokens(tokens.ids, [False, *tokens.trained[1:]])


def prompt_ids(tokenizer: Any, messages: Sequence[Message | Mapping[str, str]]) -> list[int]:
    """Token ids after which the assistant's answer begins.

    Raises:
        DataError: as `tokenize`.
    """
    (text,) = render(tokenizer, messages, [(len(messages), True)])
    return _encode(tokenizer, text)


def stop_ids(tokenizer: Any) -> set[int]:
    """Tokens that end an answer: the tokenizer's own end and the one its chat template writes after a turn."""
    ends = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        turn = [Message("user", "a", False), Message("assistant", "b", True)]
        try:
            tokens = _conversation(tokenizer, turn)
        except DataError:
            return ends  # a template that nothing can be trained with; its texts end with the tokenizer's own token
        ends.add(max(index_and_id for index_and_id in enumerate(tokens.ids) if tokens.trained[index_and_id[0]])[1])
    return ends


def render(
    tokenizer: Any, messages: Sequence[Message | Mapping[str, str]], wanted: Sequence[tuple[int, bool]]
) -> list[str]:
    """The chat template's text of the first n messages for each (n, whether the assistant's next answer begins then).

    What a message has of control tokens is between marks.

    Raises:
        DataError: as `tokenize`.
    """
    if not tokenizer.chat_template:
        raise DataError("the base model has no chat template; give rows of prompt and completion instead")
    turns = [
        {"role": message.role, "content": message.content} if isinstance(message, Message) else dict(message)
        for message in messages
    ]
    control = _control_tokens(tokenizer)
    for turn in turns:
        turn["content"] = _marked(turn["content"], control)
    template = _FIXED_DATE + tokenizer.get_chat_template()
    return chat_template.render(template, turns, wanted, tokenizer.special_tokens_map)


def _control_tokens(tokenizer: Any) -> re.Pattern[str]:
    spelled = sorted(filter(None, _specials(tokenizer)), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled)) or r"(?!)")


def _marked(content: str, control: re.Pattern[str]) -> str:
    if _OPEN in content or _CLOSE in content:
        raise DataError("a message has the noncharacter U+FDD0 or U+FDD1, which no text has; remove it")
    return control.sub(lambda found: f"{_OPEN}{found[0]}{_CLOSE}", content)


def _as_conversation(example: Instruction) -> Conversation:
    question = f"{example.instruction}\n\n{example.input}" if example.input else example.instruction
    return Conversation((Message("user", question, False), Message("assistant", example.output, True)))


def _alpaca(example: Instruction) -> PromptCompletion:
    """The prompt of Stanford Alpaca."""
    head = _ALPACA.format(paired=_PAIRED if example.input else "")
    context = f"\n\n### Input:\n{example.input}" if example.input else ""
    prompt = f"{head}\n\n### Instruction:\n{example.instruction}{context}\n\n### Response:\n"
    return PromptCompletion(prompt, example.output)


def _completion(tokenizer: Any, example: PromptCompletion) -> Tokens:
    tokens = _join(tokenizer, [_Piece(example.prompt, False), _Piece(example.completion, True)])
    start = [] if tokenizer.bos_token_id in tokens.ids[:1] else _opening(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [*start, *tokens.ids, *end]
    return Tokens(ids, [*[False] * len(start), *tokens.trained, *[True] * len(end)])


def _opening(tokenizer: Any) -> list[int]:
    """[BOS] where the tokenizer begins a document with it, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _conversation(tokenizer: Any, messages: Sequence[Message]) -> Tokens:
    pieces: list[_Piece] = []
    done = ""
    for index, message in enumerate(messages):
        if not message.trained:
            continue
        before, after = render(tokenizer, messages[: index + 1], [(index, True), (index + 1, False)])
        if not (before.startswith(done) and after.startswith(before)):
            raise DataError("the base model's chat template rewrites earlier turns; train the last answer only")
        answer = after[len(before) :]
        stop = answer.rstrip()
        # What the template writes after the stop token (a line break) is never generated, so it is not trained.
        trained = stop if stop.endswith(_specials(tokenizer)) else answer
        pieces += [_Piece(before[len(done) :], False), _Piece(trained, True)]
        done = before + trained
    tokens = _join(tokenizer, pieces)
    if not done.endswith(_specials(tokenizer)) and tokenizer.eos_token_id is not None:
        return Tokens([*tokens.ids, tokenizer.eos_token_id], [*tokens.trained, True])
    return tokens


def _join(tokenizer: Any, pieces: Sequence[_Piece]) -> Tokens:
    """Tokenise the whole text; a piece's tokens are what it adds to the tokens of the text before it.

    Where a token would reach across the border of two pieces they are tokenised apart, as generation does.
    """
    whole = _encode(tokenizer, "".join(piece.text for piece in pieces))
    trained: list[bool] = []
    text = ""
    for piece in pieces:
        text += piece.text
        prefix = _encode(tokenizer, text)
        if prefix != whole[: len(prefix)]:
            parts = [(_encode(tokenizer, part.text), part.trained) for part in pieces]
            return Tokens([id_ for ids, _ in parts for id_ in ids], [mark for ids, mark in parts for _ in ids])
        trained += [piece.trained] * (len(prefix) - len(trained))
    return Tokens(whole, trained)


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids; those of text between marks are never control tokens."""
    ids: list[int] = []
    for number, part in enumerate(re.split(f"{_OPEN}(.*?){_CLOSE}", text, flags=re.DOTALL)):
        if part or not ids:
            ids += tokenizer(part, add_special_tokens=False, split_special_tokens=bool(number % 2))["input_ids"]
    return ids


def _specials(tokenizer: Any) -> tuple[str, ...]:
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
