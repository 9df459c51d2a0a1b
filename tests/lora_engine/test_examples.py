import json
from typing import Any

import pytest

from lora_engine.errors import DataError
from lora_engine.examples import (
    MAX_LINE_BYTES,
    Conversation,
    Instruction,
    Message,
    PromptCompletion,
    parse_line,
    read_examples,
)

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Yes"}


def line(row: Any) -> bytes:
    return json.dumps(row).encode()


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "", "completion": "b"}, PromptCompletion("", "b")),
        ({"instruction": "a", "output": "c"}, Instruction("a", "", "c")),
        ({"instruction": "a", "input": "b", "output": "c"}, Instruction("a", "b", "c")),
        (
            {"messages": [{"role": "system", "content": "S"}, USER, ANSWER]},
            Conversation(
                (Message("system", "S", False), Message("user", "Hi", False), Message("assistant", "Yes", True))
            ),
        ),
    ],
)
def test_the_three_forms(row: Any, example: Any) -> None:
    assert parse_line(line(row), 1) == example


def test_only_answers_with_text_and_weight_are_trained() -> None:
    answers = [{**ANSWER, "weight": 0}, {**ANSWER, "content": " "}, {**ANSWER, "weight": 1}]
    conversation = parse_line(line({"messages": [USER, *answers]}), 1)
    assert isinstance(conversation, Conversation)
    assert [message.trained for message in conversation.messages] == [False, False, False, True]


@pytest.mark.parametrize(
    ("row", "path"),
    [
        ([1], ""),
        ({}, ""),
        ({"text": "a"}, ""),
        ({"prompt": "a"}, "completion"),
        ({"completion": "a"}, "prompt"),
        ({"prompt": "a", "completion": " "}, "completion"),
        ({"prompt": "a", "completion": "b", "extra": 1}, "extra"),
        ({"prompt": 1, "completion": "b"}, "prompt"),
        ({"instruction": "a", "output": ""}, "output"),
        ({"instruction": "a", "input": None, "output": "b"}, "input"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [USER]}, "messages"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "messages"),
        ({"messages": [USER, 1]}, "messages[1]"),
        ({"messages": [{"role": "tool", "content": "a"}, ANSWER]}, "messages[0].role"),
        ({"messages": [{"content": "a"}, ANSWER]}, "messages[0].role"),
        ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content"),
        ({"messages": [USER, {"role": "system", "content": "late"}, ANSWER]}, "messages[1].role"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "messages[1].weight"),
        ({"messages": [{**USER, "name": "x"}, ANSWER]}, "messages[0].name"),
    ],
)
def test_a_wrong_row_is_named_by_line_and_path(row: Any, path: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_line(line(row), 7)
    assert caught.value.facts == {"line": 7, "path": path}
    assert caught.value.message.startswith(f"line 7, {path}: " if path else "line 7: ")


def test_lines_that_are_no_json() -> None:
    with pytest.raises(DataError, match=r"line 2: not valid JSON: expecting value at column 1"):
        list(read_examples([line({"prompt": "a", "completion": "b"}), b"nonsense"]))
    with pytest.raises(DataError, match="the file is a JSON array"):
        parse_line(b'[{"prompt": "a",', 1)
    with pytest.raises(DataError, match="longer than"):
        parse_line(b" " * (MAX_LINE_BYTES + 1), 1)


def test_blank_lines_are_passed_over_and_counted() -> None:
    row = line({"prompt": "a", "completion": "b"})
    assert len(list(read_examples([row, b"\n", b"  \r\n", row]))) == 2
    with pytest.raises(DataError, match="line 3"):
        list(read_examples([row, b"\n", b"{}"]))
