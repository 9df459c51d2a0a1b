"""Documents of a micro-batch side by side in one row of tokens: no padding, and no prompt prefix computed twice.

Causal attention makes a token's computation a function of the tokens before it. Documents that begin with the same
tokens therefore share the rows of that beginning, exactly: the pack is a tree of segments, each of which attends to
its ancestors and to itself. What comes after a document's last target is left out, as nothing depends on it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from lora_engine.data import Document

# Matrix products like row counts of a few sizes: each new one costs oneDNN a plan of its own.
ROW_MULTIPLE = 16
# To attend to a segment of its own costs more than computing a few tokens twice.
_SHORTEST_SHARED = 8
# Long segments attend block by block, so that keys to the right of a block are never multiplied.
_QUERY_BLOCK = 256
# Segments of unlike lengths are padded to one another in attention while this many scores a head cost less than a call.
_TOLERATED_SCORES = 20_000
# Scores a head that are computed at once: beyond, they would fall out of the processor's cache.
_MOST_SCORES = 1 << 18


@dataclass(slots=True)
class AttentionGroup:
    """Segments of like lengths, padded to one another in attention alone.

    Attributes:
        queries: int64 (segments, queries), rows of the query matrix; `keys` (segments, keys) of the key matrix.
        query_positions, key_positions: int64, in the document; -1 marks a padded query, -2 a padded key.
        padded: there are padded queries.
    """

    queries: Tensor
    keys: Tensor
    query_positions: Tensor
    key_positions: Tensor
    padded: bool
    _biases: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def scores(self) -> int:
        """A head's, padding included."""
        return self.queries.numel() * self.keys.shape[1]

    def bias(self, window: int | None) -> Tensor:
        """fp32 (segments, 1, queries, keys): 0 where a query sees a key, -inf elsewhere."""
        if window not in self._biases:
            queries, keys = self.query_positions[:, :, None], self.key_positions[:, None, :]
            seen = (keys <= queries) & (keys >= 0)
            if window is not None:
                seen &= queries - keys < window
            seen |= queries < 0  # a softmax over nothing would be NaN
            bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))
            self._biases[window] = bias[:, None]
        return self._biases[window]

    def forget(self) -> None:
        """Let go of what is only made while a pack is computed."""
        self._biases.clear()

    def to(self, device: torch.device) -> "AttentionGroup":
        parts = (self.queries, self.keys, self.query_positions, self.key_positions)
        queries, keys, query_positions, key_positions = (part.to(device) for part in parts)
        return AttentionGroup(queries, keys, query_positions, key_positions, self.padded)

    def clear_padded(self, by_query: Tensor) -> None:
        """Zero the rows of padded queries in (segments, …, queries, features)."""
        if self.padded:
            absent = self.query_positions < 0
            by_query.masked_fill_(absent.view(len(absent), *[1] * (by_query.ndim - 3), -1, 1), 0)


@dataclass(frozen=True, slots=True)
class Attention:
    """Who sees whom, for one set of query rows.

    Attributes:
        groups: together they hold each query row once.
        slots: int64 (query rows, 3): where its result begins in the groups' results, flattened and concatenated, in
            units of heads; its number in its segment; and how long the segments of its group are.
    """

    groups: tuple[AttentionGroup, ...]
    slots: Tensor
    _places: dict[int, Tensor] = field(default_factory=dict)

    def places(self, heads: int) -> Tensor:
        """int64 (query rows · heads): rows of the groups' results (segments, heads, queries), flattened, in order."""
        if heads not in self._places:
            begin, number, length = self.slots.unbind(1)
            numbers = torch.arange(heads, device=self.slots.device)
            self._places[heads] = (begin[:, None] * heads + numbers * length[:, None] + number[:, None]).flatten()
        return self._places[heads]


@dataclass(frozen=True, slots=True)
class Pack:
    """A packed micro-batch of R rows, N of which predict a target (rows of rounding included in both).

    Attributes:
        ids, positions, examples: int64 (R): token, position in the document, the document's number in the dataset.
        attention: of all rows; `target_attention` of the predicting rows alone.
        predicts: int64 (N), rows whose next token is a target; `targets` int64 (N) are those tokens.
        weights: fp32 (N), 1 for a target, 0 for a row of rounding.
        tokens: of the documents, as if nothing were shared or left out; `trained_tokens` of them are targets.
        scores: query-key pairs that attention has to look at, in one layer; `target_scores` those of predicting rows.
    """

    ids: Tensor
    positions: Tensor
    examples: Tensor
    attention: Attention
    target_attention: Attention
    predicts: Tensor
    targets: Tensor
    weights: Tensor
    tokens: int
    trained_tokens: int
    scores: int
    target_scores: int

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def mask_bytes(self) -> int:
        """Of the attention masks while the pack is computed, for one window."""
        return 4 * sum(group.scores for attention in self._attentions for group in attention.groups)

    def forget(self) -> None:
        """Let go of the attention masks, which are made again when they are needed."""
        for attention in self._attentions:
            for group in attention.groups:
                group.forget()

    @property
    def _attentions(self) -> tuple[Attention, Attention]:
        return self.attention, self.target_attention


@dataclass(slots=True)
class _Item:
    """A document ready to be packed: the tokens that matter, and how many of them may be shared."""

    document: Document
    ids: list[int]
    predicts: list[int]
    sharable: int


@dataclass(slots=True)
class _Segment:
    """Tokens start … stop of `item`, at rows from `row` on; `above` holds the rows of its ancestors."""

    item: _Item
    start: int
    stop: int
    row: int
    above: list[int]


def packs(
    documents: Sequence[Document], max_tokens: int, device: torch.device, *, share: bool = True
) -> Iterator[Pack]:
    """Micro-batches of `documents`, each of at most `max_tokens` computed rows (a single document may be longer).

    With `share` false no two documents share rows: dropout gives each its own.
    """
    for items in _micro_batches(documents, max_tokens, share):
        yield _pack(items, device, share)


def _micro_batches(documents: Sequence[Document], max_tokens: int, share: bool) -> Iterator[list[_Item]]:
    items = sorted((_item(document) for document in documents), key=lambda item: (item.ids, item.document.number))
    group: list[_Item] = []
    rows = 0
    for item in items:
        added = len(item.ids) - (_common(group[-1], item) if group and share else 0)
        if group and rows + added > max_tokens:
            yield group
            group, rows, added = [], 0, len(item.ids)
        group.append(item)
        rows += added
    if group:
        yield group


def _item(document: Document) -> _Item:
    predicts = (document.trained[1:].nonzero().flatten()).tolist()
    return _Item(document, document.ids[: predicts[-1] + 1].tolist(), predicts, predicts[0])


def _common(one: _Item, other: _Item) -> int:
    """Length of the beginning that both share and neither predicts from; 0 where it is too short to be worth it."""
    limit = min(one.sharable, other.sharable)
    if one.ids[:limit] == other.ids[:limit]:
        common = limit
    else:
        pairs = zip(one.ids[:limit], other.ids[:limit], strict=True)
        common = next(index for index, (first, second) in enumerate(pairs) if first != second)
    return common if common >= _SHORTEST_SHARED else 0


def _segments(items: Sequence[_Item], share: bool) -> list[_Segment]:
    """The tree, in the order of its rows. `items` are sorted by their tokens."""
    common = [0, *(_common(*pair) if share else 0 for pair in pairwise(items))]
    found: list[_Segment] = []
    row = 0

    def place(index: int, start: int, stop: int, above: list[int]) -> list[int]:
        nonlocal row
        found.append(_Segment(items[index], start, stop, row, above))
        rows = list(range(row, row + stop - start))
        row += stop - start
        return above + rows

    def grow(first: int, last: int, start: int, above: list[int]) -> None:
        """Items first … last (exclusive) share their tokens before `start`, whose rows are `above`."""
        if last - first == 1:
            place(first, start, len(items[first].ids), above)
            return
        shared = min(common[first + 1 : last])
        if shared > start:
            above = place(first, start, shared, above)
            start = shared
        cuts = [index for index in range(first + 1, last) if common[index] <= start]
        for begin, end in zip([first, *cuts], [*cuts, last], strict=True):
            grow(begin, end, start, above)

    grow(0, len(items), 0, [])
    return found


def _pack(items: Sequence[_Item], device: torch.device, share: bool) -> Pack:
    segments = _segments(items, share)
    ids: list[int] = []
    positions: list[int] = []
    examples: list[int] = []
    predicts: list[int] = []
    targets: list[int] = []
    everyone: list[tuple[list[int], list[int]]] = []
    predicting: list[tuple[list[int], list[int]]] = []
    for segment in segments:
        item, shift = segment.item, segment.row - segment.start
        ids += item.ids[segment.start : segment.stop]
        positions += range(segment.start, segment.stop)
        examples += [item.document.number] * (segment.stop - segment.start)
        rows = range(segment.row, segment.row + segment.stop - segment.start)
        everyone += _blocks(list(rows), segment)
        if segment.stop == len(item.ids):  # a leaf: what is shared predicts nothing
            own = [position + shift for position in item.predicts]
            predicts += own
            targets += item.document.ids[[position + 1 for position in item.predicts]].tolist()
            predicting += _blocks(own, segment)
    weights = [1.0] * len(predicts)
    scores, target_scores = (
        sum(len(queries) * len(keys) for queries, keys in blocks) for blocks in (everyone, predicting)
    )
    if spare := -len(ids) % ROW_MULTIPLE:
        rows = range(len(ids), len(ids) + spare)
        everyone.append((list(rows), list(rows)))
        ids += [0] * spare
        positions += range(spare)
        examples += [0] * spare
    if spare := -len(predicts) % ROW_MULTIPLE:
        predicting.append(([0] * spare, [0]))
        predicts += [0] * spare
        targets += [0] * spare
        weights += [0.0] * spare
    return Pack(
        ids=torch.tensor(ids, device=device),
        positions=torch.tensor(positions, device=device),
        examples=torch.tensor(examples, device=device),
        attention=_attention(everyone, list(range(len(ids))), positions, device),
        target_attention=_attention(predicting, predicts, positions, device),
        predicts=torch.tensor(predicts, device=device),
        targets=torch.tensor(targets, device=device),
        weights=torch.tensor(weights, device=device),
        tokens=sum(len(item.document) for item in items),
        trained_tokens=sum(len(item.predicts) for item in items),
        scores=scores,
        target_scores=target_scores,
    )


def _blocks(queries: list[int], segment: _Segment) -> Iterator[tuple[list[int], list[int]]]:
    """(query rows, key rows) of a segment's queries, a block at a time; keys end with the block's last query."""
    for start in range(0, len(queries), _QUERY_BLOCK):
        block = queries[start : start + _QUERY_BLOCK]
        yield block, [*segment.above, *range(segment.row, block[-1] + 1)]


def _attention(
    blocks: Sequence[tuple[list[int], list[int]]], rows: list[int], positions: list[int], device: torch.device
) -> Attention:
    """`rows` are the query rows in their order; `blocks` hold them in the same order."""
    order = sorted(range(len(blocks)), key=lambda index: (len(blocks[index][1]), len(blocks[index][0]), index))
    grouped: list[list[int]] = []
    for index in order:
        if grouped and _together([blocks[member] for member in (*grouped[-1], index)]):
            grouped[-1].append(index)
        else:
            grouped.append([index])
    begins = [0]
    for queries, _ in blocks:
        begins.append(begins[-1] + len(queries))
    slots = torch.empty(len(rows), 3, dtype=torch.long)
    groups: list[AttentionGroup] = []
    offset = 0
    for members in grouped:
        longest = max(len(blocks[member][0]) for member in members)
        most = max(len(blocks[member][1]) for member in members)
        query_rows = torch.zeros(len(members), longest, dtype=torch.long)
        key_rows = torch.zeros(len(members), most, dtype=torch.long)
        query_positions = torch.full((len(members), longest), -1)
        key_positions = torch.full((len(members), most), -2)
        for place, member in enumerate(members):
            own, seen = blocks[member]
            # Query rows are numbered as they come; key rows are those of the pack.
            numbers = torch.arange(begins[member], begins[member + 1])
            query_rows[place, : len(own)] = numbers
            key_rows[place, : len(seen)] = torch.tensor(seen)
            query_positions[place, : len(own)] = torch.tensor([positions[row] for row in own])
            key_positions[place, : len(seen)] = torch.tensor([positions[row] for row in seen])
            slots[numbers, 0] = offset + place * longest
            slots[numbers, 1] = torch.arange(len(own))
            slots[numbers, 2] = longest
        offset += len(members) * longest
        padded = bool((query_positions < 0).any())
        group = AttentionGroup(query_rows, key_rows, query_positions, key_positions, padded)
        groups.append(group.to(device))
    return Attention(tuple(groups), slots.to(device))


def _together(blocks: Sequence[tuple[list[int], list[int]]]) -> bool:
    """Whether padding these blocks to one another costs less than a call of its own, and stays small."""
    longest, most = (max(len(block[side]) for block in blocks) for side in (0, 1))
    scores = len(blocks) * longest * most
    wasted = scores - sum(len(queries) * len(keys) for queries, keys in blocks)
    return wasted <= _TOLERATED_SCORES and scores <= _MOST_SCORES
