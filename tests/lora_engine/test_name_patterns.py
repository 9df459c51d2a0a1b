import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from lora_engine.errors import AdapterError
from lora_engine.name_patterns import Budget, NamePattern, NamePatterns, ends

ATOMS = st.sampled_from(
    ["a", "b", "_", r"\.", ".", "1", "[ab]", "[^a.]", "[0-3]", r"[\d_]", "[]a]", "[a-]", r"\d", r"\w", r"\W", "^", "$"]
)
QUANTIFIERS = st.sampled_from(["", "", "", "*", "+", "?", "*?", "{2}", "{1,2}", "{1,}", "{0,1}?"])


def joined(atoms: Any) -> Any:
    piece = st.tuples(atoms, QUANTIFIERS).map(lambda pair: "".join(pair) if pair[0] not in "^$" else pair[0])
    return st.lists(piece, max_size=4).map("".join)


PATTERNS = st.recursive(
    joined(ATOMS),
    lambda inner: joined(st.lists(inner, min_size=1, max_size=3).map(lambda options: f"({'|'.join(options)})")),
    max_leaves=3,
)
NAMES = st.lists(st.text("ab_1", min_size=1, max_size=2), min_size=1, max_size=2).map(".".join)


@settings(deadline=None)  # re itself would take for ever on some
@given(PATTERNS, NAMES)
def test_a_pattern_fits_the_names_that_re_and_peft_say(text: str, name: str) -> None:
    assert NamePattern(text).matches(name) == bool(re.fullmatch(text, name))
    expected = bool(re.match(rf"(.*\.)?({text})$", name))
    assert NamePattern(text, any_parent=True).matches(name) == expected
    assert NamePatterns({text: True}).first(name, False) == expected


@settings(deadline=None)  # re itself would take for ever on some
@given(
    st.lists(st.one_of(PATTERNS, NAMES, NAMES.map(re.escape), NAMES.map(lambda n: "^" + re.escape(n))), max_size=5),
    NAMES,
)
def test_the_first_pattern_counts_as_in_peft(texts: list[str], name: str) -> None:
    found = NamePatterns({text: text for text in texts}).first(name, name)
    assert found == get_pattern_key(list(dict.fromkeys(texts)), name)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(", "an end that comes too early|not closed"),
        ("a)", "unbalanced"),
        ("(?i)a", "flags"),
        ("(?=a)", "looks around"),
        (r"(a)\1", "escape"),
        (r"\bq", "escape"),
        ("*a", "nothing to repeat"),
        ("a**", "repetition of a repetition"),
        ("a*+", "repetition of a repetition"),
        ("a{3,2}", "ends before it begins"),
        ("[a", "too early"),
        ("[b-a]", "a range that is none"),
        ("a" * 600, "at most 512"),
        ("(" * 30 + "a" + ")" * 30, "deeper than 20"),
        ("(a{1000}){1000}", "too large"),
        ("((a{0}){9999}){9999}", "too large"),
        ("((((a{9}){9}){9}){9}){9}", "too large"),
    ],
)
def test_what_cannot_be_matched_in_bounded_time_is_refused(text: str, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        NamePattern(text)


@pytest.mark.parametrize("text", ["(a+)+b", "(a|a)*b", ".*.*.*.*.*.*b", "(a*)*b", "((a?){30}){9}b"])
def test_patterns_that_make_backtracking_explode_take_moments(text: str) -> None:
    pattern = NamePattern(text)
    assert not pattern.matches("a" * 400)  # re takes years
    assert pattern.matches("a" * 30 + "b")


def test_a_budget_ends_what_takes_too_long() -> None:
    pattern = NamePattern("((a|b|c|d)?(a|b|c|e)?(a|b){0,30}){0,12}x", budget=Budget(100_000))
    names = (f"{number:b}".translate({48: "a", 49: "b"}) * 9 for number in range(1_000_000))
    with pytest.raises(AdapterError, match="takes too long"):
        list(map(pattern.matches, names))


def test_many_patterns_share_a_budget() -> None:
    patterns = NamePatterns({f"q.{number}": number for number in range(500)}, Budget(10_000))
    with pytest.raises(AdapterError, match="takes too long"):
        [patterns.first(f"layers.{number}.v_proj", 0) for number in range(500)]
    with pytest.raises(AdapterError, match="more than 4000000 characters"):
        NamePatterns({f"{number:0500}": 1 for number in range(9_000)})


def test_a_name_ends_in_its_last_parts() -> None:
    assert list(ends("model.layers.q_proj")) == ["model.layers.q_proj", "layers.q_proj", "q_proj"]


def test_a_pattern_of_every_module_by_its_full_name_is_a_look_up() -> None:
    names = [f"model.layers.{layer}.mlp.m{number}_proj" for layer in range(80) for number in range(7)]
    patterns = NamePatterns({"^" + re.escape(name): number for number, name in enumerate(names)})
    assert [patterns.first(name, -1) for name in names] == list(range(len(names)))
    assert patterns.first("x." + names[0], -1) == -1
