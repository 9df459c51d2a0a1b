from typing import Any

import pytest

from lora_engine.strict_json import MAX_DEPTH, StrictJSONError, loads


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, true, "ü\\n"]}', "[]", '"x"', "0", "-1e-3"])
def test_json_is_read(text: str) -> None:
    import json

    assert loads(text) == loads(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "expecting value at column 1"),
        ("{", "column 2"),
        ("[1] x", "extra data at column 5"),
        (b'"\xff"', "not UTF-8 at byte 2"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("NaN", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("1e400", "the number 1e400 is too large"),
        ("9" * 301, "an integer of 301 digits is too large"),
        ('{"a": 1, "b": {"a": 1, "a": 2}}', "the key 'a' appears twice"),
        ('["a\\u0000"]', "NUL"),
        ('{"\\ud800": 1}', "half of a surrogate pair"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), f"deeper than {MAX_DEPTH} levels"),
        ("[" * 100_000, f"deeper than {MAX_DEPTH} levels"),
    ],
)
def test_what_json_does_not_have_is_refused(data: Any, message: str) -> None:
    with pytest.raises(StrictJSONError, match=message):
        loads(data)


def test_the_limits_themselves_are_allowed() -> None:
    assert loads("9" * 300) == 10**300 - 1
    loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    assert loads('"\\ud83d\\ude00"') == "😀"
