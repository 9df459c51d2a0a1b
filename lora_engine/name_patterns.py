"""Regular expressions on module names, from foreign configs, matched in bounded time.

Python's own matching backtracks: `(a+)+$` takes longer than the universe on a name of a hundred letters. Here the
expression becomes a nondeterministic automaton whose states are followed side by side (Thompson 1968), so the time is
at most names × length × states. All of `re` that decides by itself whether a name fits is read: literals, classes,
alternatives, groups, repetition (greedy or lazy, which fit the same names), `^` and `$`. What looks around or back is
refused, and so is whatever goes beyond a budget.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from lora_engine.errors import AdapterError

V = TypeVar("V")

NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+){0,31}")  # of a module or a tensor
_MAX_LENGTH = 512
_MAX_TOTAL_LENGTH = 4_000_000  # of all patterns of one field: 50,000 full names
_MAX_NODES = 10_000  # with every repetition written out
_MAX_DEPTH = 20
_MAX_STEPS = 1_000_000  # seconds, at the worst
_DIGIT = (("0", "9"),)
_WORD = (("0", "9"), ("A", "Z"), ("a", "z"), ("_", "_"))
_CLASSES = {"d": (False, _DIGIT), "D": (True, _DIGIT), "w": (False, _WORD), "W": (True, _WORD)}
_QUANTIFIERS: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_COUNT = re.compile(r"\{(\d{1,4})(,?)(\d{0,4})\}")


@dataclass(frozen=True, slots=True)
class _Char:
    """One character out of (or, negated, none of) some ranges."""

    negated: bool
    ranges: tuple[tuple[str, str], ...]

    def fits(self, character: str) -> bool:
        return any(low <= character <= high for low, high in self.ranges) != self.negated


@dataclass(frozen=True, slots=True)
class _Edge:
    """ "^" or "$": passed at the start or at the end alone."""

    start: bool


@dataclass(frozen=True, slots=True)
class _Sequence:
    nodes: tuple["_Node", ...]


@dataclass(frozen=True, slots=True)
class _Choice:
    nodes: tuple["_Node", ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    node: "_Node"
    low: int
    high: int | None


_Node: TypeAlias = _Char | _Edge | _Sequence | _Choice | _Repeat
_ANY = _Char(True, ())
_DOT = _Char(False, ((".", "."),))
_ANY_PARENT = _Repeat(_Sequence((_Repeat(_ANY, 0, None), _DOT)), 0, 1)  # PEFT's (.*\.)?
_ACCEPT = 0


class Budget:
    """Steps that matching may take, over all patterns and names that share it."""

    def __init__(self, steps: int = _MAX_STEPS) -> None:
        self._left = steps

    def spend(self, steps: int, text: str) -> None:
        """Raises AdapterError, with the pattern `text`, where too few are left."""
        self._left -= steps
        if self._left < 0:
            raise AdapterError(f"matching the pattern {text[:60]!r} takes too long; write it more simply, or fewer")


class NamePatterns(Generic[V]):
    """Patterns with a value each; the first that matches a name's end counts, as in PEFT's `get_pattern_key`.

    A pattern stands for whole parts of a name, from its start or from after a dot: "q_proj" is not "my_q_proj".
    """

    def __init__(self, patterns: Mapping[str, V], budget: Budget | None = None) -> None:
        """Raises AdapterError: too many, or one that cannot be matched in bounded time."""
        if sum(map(len, patterns)) > _MAX_TOTAL_LENGTH:
            raise AdapterError(f"the patterns have more than {_MAX_TOTAL_LENGTH} characters")
        budget = Budget() if budget is None else budget
        self._literal: dict[str, tuple[int, V]] = {}
        self._others: list[tuple[int, NamePattern, V]] = []
        for position, (text, value) in enumerate(patterns.items()):
            pattern = NamePattern(text, any_parent=True, budget=budget)
            if pattern.literal is None:
                self._others.append((position, pattern, value))
            else:
                self._literal.setdefault(pattern.literal, (position, value))

    def first(self, name: str, default: V) -> V:
        """The value of the first pattern that matches the module `name`."""
        candidates = [self._literal[key] for key in (f"^{name}", *ends(name)) if key in self._literal]
        found = min(candidates, key=lambda item: item[0], default=None)
        for position, pattern, value in self._others:
            if found is not None and position > found[0]:
                break
            if pattern.matches(name):
                return value
        return default if found is None else found[1]


@dataclass
class NamePattern:
    """One regular expression that a whole name must match, or with `any_parent` the end of it from a dot on.

    Attributes:
        literal: the pattern where it stands for one text alone, with "^" before it if it is anchored.
    """

    text: str
    any_parent: bool = False
    budget: Budget = field(default_factory=Budget)
    literal: str | None = field(init=False, default=None)
    _fixed: tuple[_Char, ...] | None = field(init=False, default=None)
    _states: list[tuple[Any, ...]] = field(init=False, default_factory=lambda: [("accept",)])
    _built: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or len(self.text) > _MAX_LENGTH:
            raise AdapterError(f"{str(self.text)[:40]!r} is not a pattern of at most {_MAX_LENGTH} characters")
        node = _Parser(self.text).parse()
        self.literal = _literal(node)
        nodes = node.nodes if isinstance(node, _Sequence) else (node,)
        if all(isinstance(item, _Char) for item in nodes):
            self._fixed = tuple(item for item in nodes if isinstance(item, _Char))
        self._first = self._build(_Sequence((_ANY_PARENT, node)) if self.any_parent else node, _ACCEPT)
        self._known: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def matches(self, name: str) -> bool:
        """Whether the expression fits `name` (ASCII, without line ends).

        Raises:
            AdapterError: all names together take more steps than the budget has.
        """
        self.budget.spend(1, self.text)
        if self._fixed is not None:
            return self._matches_fixed(name, self._fixed)
        current = self._closure(frozenset({self._first}), at_start=True)
        for character in name:
            current = self._step(current, character)
            if not current:
                return False
        return _ACCEPT in self._closure(current, at_start=not name, at_end=True)

    def _matches_fixed(self, name: str, fixed: tuple[_Char, ...]) -> bool:
        start = len(name) - len(fixed)
        if start < 0 or (start and not (self.any_parent and name[start - 1] == ".")):
            return False
        return all(item.fits(character) for item, character in zip(fixed, name[start:], strict=True))

    def _step(self, current: frozenset[int], character: str) -> frozenset[int]:
        key = (current, character)
        if (known := self._known.get(key)) is not None:
            return known
        following = frozenset(
            state[2]
            for state in map(self._states.__getitem__, current)
            if state[0] == "char" and state[1].fits(character)
        )
        self.budget.spend(len(current), self.text)
        self._known[key] = result = self._closure(following)
        return result

    def _closure(self, states: frozenset[int], *, at_start: bool = False, at_end: bool = False) -> frozenset[int]:
        """What can be reached without a character."""
        found, waiting = set(states), list(states)
        while waiting:
            kind, *rest = self._states[waiting.pop()]
            passed = kind == "split" or (kind == "start" and at_start) or (kind == "end" and at_end)
            new = set(rest if passed else ()) - found
            found |= new
            waiting += new
        self.budget.spend(len(found), self.text)
        return frozenset(found)

    def _build(self, node: _Node, then: int) -> int:
        """Add the states of `node`, after which comes the state `then`; its first state."""
        self._built += 1
        if self._built > _MAX_NODES:
            raise AdapterError(f"the pattern {self.text[:60]!r} is too large; write it more simply")
        match node:
            case _Char():
                return self._add("char", node, then)
            case _Edge():
                return self._add("start" if node.start else "end", then)
            case _Sequence():
                for item in reversed(node.nodes):
                    then = self._build(item, then)
                return then
            case _Choice():
                return self._add("split", *(self._build(item, then) for item in node.nodes))
            case _Repeat():
                return self._build_repeat(node, then)

    def _build_repeat(self, node: _Repeat, then: int) -> int:
        if node.high is None:
            loop = self._add("split", then)
            self._states[loop] = ("split", then, self._build(node.node, loop))
            then = loop
        else:
            end = then
            for _ in range(node.high - node.low):
                then = self._add("split", end, self._build(node.node, then))
        for _ in range(node.low):
            then = self._build(node.node, then)
        return then

    def _add(self, *state: Any) -> int:
        self._states.append(state)
        return len(self._states) - 1


class _Parser:
    """Recursive descent over the part of `re`'s syntax that is read."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0

    def parse(self) -> _Node:
        node = self._choice()
        if self._at < len(self._text):
            raise self._fault("unbalanced parenthesis")
        return node

    def _choice(self) -> _Node:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self) -> _Node:
        nodes: list[_Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            nodes.append(self._repeated(self._atom()))
        return nodes[0] if len(nodes) == 1 else _Sequence(tuple(nodes))

    def _repeated(self, node: _Node) -> _Node:
        if (count := _COUNT.match(self._text, self._at)) is not None:
            low, comma, high = count.groups()
            bounds = (int(low), (int(high) if high else None) if comma else int(low))
            self._at = count.end()
        elif self._at < len(self._text) and self._text[self._at] in _QUANTIFIERS:
            bounds = _QUANTIFIERS[self._text[self._at]]
            self._at += 1
        else:
            return node
        self._take("?")  # lazy: which of several ways fits makes no difference
        following = self._text[self._at : self._at + 1]
        if following in ("*", "+", "?") or _COUNT.match(self._text, self._at):
            raise self._fault("repetition of a repetition")
        if bounds[1] is not None and bounds[1] < bounds[0]:
            raise self._fault("a repetition that ends before it begins")
        return _Repeat(node, *bounds)

    def _atom(self) -> _Node:
        character = self._next()
        match character:
            case "(":
                return self._group()
            case "[":
                return self._class()
            case ".":
                return _ANY
            case "^" | "$":
                return _Edge(character == "^")
            case "\\":
                return self._escape()
            case "*" | "+" | "?" | "{":
                raise self._fault("nothing to repeat")
        return _Char(False, ((character, character),))

    def _group(self) -> _Node:
        if self._take("?") and not self._take(":"):
            raise self._fault("a group that looks around, names or sets flags")
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._fault(f"groups deeper than {_MAX_DEPTH}")
        node = self._choice()
        self._depth -= 1
        if not self._take(")"):
            raise self._fault("a group that is not closed")
        return node

    def _escape(self) -> _Char:
        character = self._next()
        if character in _CLASSES:
            return _Char(*_CLASSES[character])
        if character.isalnum():
            raise self._fault(f"the escape \\{character}")
        return _Char(False, ((character, character),))

    def _class(self) -> _Char:
        negated = self._take("^")
        ranges: list[tuple[str, str]] = []
        while not ranges or self._text[self._at : self._at + 1] != "]":
            ranges += self._member()
        self._at += 1
        return _Char(negated, tuple(ranges))

    def _member(self) -> Iterator[tuple[str, str]]:
        item = self._escape() if (low := self._next()) == "\\" else _Char(False, ((low, low),))
        if self._text[self._at : self._at + 1] != "-" or self._text[self._at + 1 : self._at + 2] in ("]", ""):
            if item.negated:
                raise self._fault("a negated class inside a class")
            return iter(item.ranges)
        self._at += 1
        high = self._escape() if (end := self._next()) == "\\" else _Char(False, ((end, end),))
        if len(item.ranges) + len(high.ranges) != 2 or high.ranges[0][1] < item.ranges[0][0]:
            raise self._fault("a range that is none")
        if item.ranges == _DIGIT or high.ranges == _DIGIT:
            raise self._fault("a range that is none")
        return iter(((item.ranges[0][0], high.ranges[0][1]),))

    def _next(self) -> str:
        if self._at >= len(self._text):
            raise self._fault("an end that comes too early")
        self._at += 1
        return self._text[self._at - 1]

    def _take(self, character: str) -> bool:
        taken = self._text.startswith(character, self._at)
        self._at += taken
        return taken

    def _fault(self, reason: str) -> AdapterError:
        return AdapterError(f"{self._text[:60]!r} is not a regular expression that is read: {reason}")


def _literal(node: _Node) -> str | None:
    nodes = list(node.nodes) if isinstance(node, _Sequence) else [node]
    anchored = bool(nodes) and nodes[0] == _Edge(start=True)
    nodes = nodes[anchored:]
    if nodes and nodes[-1] == _Edge(start=False):
        nodes.pop()
    text = ["^"] if anchored else []
    for item in nodes:
        if not isinstance(item, _Char) or item.negated or len(item.ranges) != 1 or len(set(item.ranges[0])) != 1:
            return None
        text.append(item.ranges[0][0])
    return "".join(text)


def ends(name: str) -> Iterator[str]:
    """A module's name, and every end of it from after a dot on: what may stand for it in a list of targets."""
    yield name
    for position, character in enumerate(name):
        if character == ".":
            yield name[position + 1 :]
