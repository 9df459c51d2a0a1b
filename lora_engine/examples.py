"""Rows of a dataset: one JSON object a line, in one of three forms, each checked by itself.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…", "weight": 1}]}
    {"prompt": "…", "completion": "…"}
    {"instruction": "…", "input": "…", "output": "…"}

This module imports no torch and no tokenizer: the service uses it while bytes still arrive, the engine
when it trains, so that what was accepted is what is trained.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_engine import strict_json
from lora_engine.errors import DataError

MAX_LINE_BYTES = 1 << 20
MAX_MESSAGES = 256  # every answer is rendered with all that came before it
Role = Literal["system", "user", "assistant"]
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation. `trained` turns carry loss; only the assistant's can."""

    role: Role
    content: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat row, rendered with the base model's chat template."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Raw text and its continuation; no template is applied."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Instruction:
    """An Alpaca row; a conversation of two turns where there is a chat template, Alpaca's own prompt where not."""

    instruction: str
    input: str
    output: str


Example = Conversation | PromptCompletion | Instruction


def parse_line(line: bytes, number: int) -> Example:
    """One line of a JSONL file.

    Raises:
        DataError: with `line` and `path`; the message names both and the remedy.
    """
    if len(line) > MAX_LINE_BYTES:
        raise _fault(number, "", f"the line is longer than {MAX_LINE_BYTES} bytes; split the example")
    try:
        row = strict_json.loads(line)
    except strict_json.StrictJSONError as error:
        if number == 1 and line.lstrip()[:1] == b"[":
            raise _fault(number, "", "the file is a JSON array; write one JSON object per line (JSONL)") from None
        raise _fault(number, "", f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise _fault(number, "", f"expected a JSON object, found {_kind(row)}")
    return _parse_row(row, number)


def read_examples(lines: Iterable[bytes]) -> Iterator[tuple[int, Example]]:
    """All examples of a JSONL file, each with the number of its line; blank lines are passed over.

    Raises:
        DataError: at the first line that cannot be used.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, parse_line(line, number)


def _parse_row(row: Mapping[str, Any], line: int) -> Example:
    if "messages" in row:
        _only(row, {"messages"}, line)
        return Conversation(_messages(row["messages"], line))
    if "prompt" in row or "completion" in row:
        _only(row, {"prompt", "completion"}, line)
        example = PromptCompletion(_text(row, "prompt", line), _text(row, "completion", line))
        if not example.completion.strip():
            raise _fault(line, "completion", "is empty: nothing would be trained; fill it or drop the row")
        return example
    if "instruction" in row:
        _only(row, {"instruction", "input", "output"}, line)
        context = _text(row, "input", line) if "input" in row else ""
        instruction = Instruction(_text(row, "instruction", line), context, _text(row, "output", line))
        if not instruction.output.strip():
            raise _fault(line, "output", "is empty: nothing would be trained; fill it or drop the row")
        return instruction
    raise _fault(
        line, "", "expected the keys messages, or prompt and completion, or instruction and output; "
        f"found {', '.join(sorted(row)[:8])[:80] or 'none'}"
    )  # fmt: skip


def _messages(value: Any, line: int) -> tuple[Message, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        raise _fault(line, "messages", f"expected an array of 1 to {MAX_MESSAGES} messages; split longer conversations")
    messages = tuple(_message(item, index, line) for index, item in enumerate(value))
    for index, message in enumerate(messages):
        if message.role == "system" and index:
            raise _fault(line, f"messages[{index}].role", "a system message can only come first")
    if not any(message.trained for message in messages):
        raise _fault(line, "messages", "no assistant message with text and weight 1: nothing would be trained")
    return messages


def _message(value: Any, index: int, line: int) -> Message:
    path = f"messages[{index}]"
    if not isinstance(value, dict):
        raise _fault(line, path, f"expected an object, found {_kind(value)}")
    _only(value, {"role", "content", "weight"}, line, path)
    role = value.get("role")
    if role not in _ROLES:
        raise _fault(line, f"{path}.role", f"expected one of {', '.join(_ROLES)}, found {str(role)[:40]!r}")
    weight = value.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        raise _fault(line, f"{path}.weight", "expected 0 or 1")
    content = _text(value, "content", line, path)
    return Message(role, content, role == "assistant" and weight == 1 and bool(content.strip()))


def _text(row: Mapping[str, Any], key: str, line: int, parent: str = "") -> str:
    path = f"{parent}.{key}" if parent else key
    if key not in row:
        raise _fault(line, path, "is missing")
    value = row[key]
    if not isinstance(value, str):
        raise _fault(line, path, f"expected text, found {_kind(value)}")
    return value


def _only(row: Mapping[str, Any], allowed: set[str], line: int, parent: str = "") -> None:
    unknown = sorted(set(row) - allowed)
    if unknown:
        path = f"{parent}.{unknown[0]}" if parent else unknown[0]
        raise _fault(line, path[:80], f"unknown key; {', '.join(sorted(allowed))} are the ones used here")


def _kind(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "an array", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _fault(line: int, path: str, message: str) -> DataError:
    where = f"line {line}, {path}" if path else f"line {line}"
    return DataError(f"{where}: {message}", line=line, path=path)
