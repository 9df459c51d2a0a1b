from itertools import pairwise

import pytest
import torch

from lora_engine import packing
from lora_engine.data import Document
from lora_engine.packing import Pack, packs
from tests.lora_engine.documents import templated

CPU = torch.device("cpu")


def rounded(rows: int) -> int:
    return rows + -rows % packing.ROW_MULTIPLE


def histories(pack: Pack) -> list[list[int]]:
    """For each row the tokens that it sees, in the order of their positions, read off the attention groups."""
    seen: dict[int, list[int]] = {}
    for group in pack.attention.groups:
        visible = torch.isfinite(group.bias(None)[:, 0])
        for segment, queries in enumerate(group.queries.tolist()):
            for place, query in enumerate(queries):
                if group.query_positions[segment, place] >= 0:
                    keys = group.keys[segment][visible[segment, place]]
                    order = pack.positions[keys].argsort()
                    assert pack.positions[keys][order].tolist() == list(range(int(pack.positions[query]) + 1))
                    seen[query] = pack.ids[keys][order].tolist()
    return [seen[row] for row in range(pack.rows)]


@pytest.mark.parametrize("max_tokens", [1, 60, 4096])
@pytest.mark.parametrize("share", [True, False])
def test_every_target_is_predicted_once_from_its_own_document_up_to_there(max_tokens: int, share: bool) -> None:
    documents = templated()
    found: list[tuple[list[int], int]] = []
    for pack in packs(documents, max_tokens, CPU, share=share):
        seen = histories(pack)
        rows = zip(pack.predicts.tolist(), pack.targets.tolist(), pack.weights.tolist(), strict=True)
        found += [(seen[row], target) for row, target, weight in rows if weight]
    expected = [
        (document.ids[:position].tolist(), int(document.ids[position]))
        for document in documents
        for position in document.trained.nonzero().flatten().tolist()
    ]
    assert sorted(found) == sorted(expected)


def test_shared_beginnings_are_computed_once_and_what_follows_the_last_target_never() -> None:
    documents = templated()
    (pack,) = packs(documents, 4096, CPU)
    needed = {
        tuple(document.ids[: position + 1].tolist())
        for document in documents
        for position in range(int(document.trained.nonzero().max()))
    }
    assert pack.rows == rounded(len(needed))
    (alone,) = packs(documents, 4096, CPU, share=False)
    assert alone.rows == rounded(sum(int(document.trained.nonzero().max()) for document in documents))
    assert alone.rows > pack.rows
    assert pack.tokens == alone.tokens == sum(len(document) for document in documents)
    assert pack.trained_tokens == sum(document.trained_tokens for document in documents)


def test_a_beginning_that_predicts_is_not_shared() -> None:
    ids = torch.arange(30).int()
    texts = [Document(number, ids, torch.arange(30) > 0) for number in range(2)]
    (pack,) = packs(texts, 4096, CPU)
    assert pack.trained_tokens == 58
    assert int(pack.weights.sum()) == 58
    assert len(set(pack.predicts.tolist())) == 58


def test_rows_are_rounded_with_rows_that_weigh_nothing() -> None:
    for pack in packs(templated(), 60, CPU):
        assert pack.rows % packing.ROW_MULTIPLE == len(pack.predicts) % packing.ROW_MULTIPLE == 0
        assert int(pack.weights.sum()) == pack.trained_tokens


def test_micro_batches_keep_to_the_budget_but_for_a_longer_document() -> None:
    rows = [pack.rows for pack in packs(templated(), 60, CPU)]
    assert max(rows) == rounded(89)  # the document of 90 tokens, whose last one predicts nothing
    assert sorted(rows)[-2] <= rounded(60)
    assert len(rows) < len(templated())


def test_packs_are_a_function_of_the_documents_not_of_their_order() -> None:
    documents = templated()
    there, back = (list(packs(order, 60, CPU)) for order in (documents, documents[::-1]))
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(there, back, strict=True))


def test_long_documents_attend_block_by_block_and_never_to_the_right() -> None:
    length = 700
    document = Document(0, torch.arange(length).int() % 300, torch.arange(length) > 0)
    (pack,) = packs([document], 4096, CPU)
    assert histories(pack)[:699] == [document.ids[: row + 1].tolist() for row in range(699)]
    sizes = sorted(tuple(group.keys.shape) for group in pack.attention.groups)
    assert sizes[-1] == (1, 699)
    assert pack.scores < 0.72 * 699 * 699


def test_a_window_hides_what_lies_further_back() -> None:
    (pack,) = packs(templated(lengths=(20,)), 4096, CPU)
    for group in pack.attention.groups:
        present = group.query_positions.flatten() >= 0
        seen, whole = (torch.isfinite(group.bias(window)).sum(-1).flatten()[present] for window in (4, None))
        assert torch.equal(seen, whole.clamp(max=4))


def test_groups_are_of_like_length() -> None:
    lengths = tuple(range(20, 600, 29))
    (pack,) = packs(templated(lengths=lengths), 100_000, CPU)
    padded = sum(group.scores for group in pack.attention.groups)
    assert padded < 1.5 * pack.scores
    assert len(pack.attention.groups) < len(lengths)
    assert all(group.scores <= 1 << 18 for group in pack.attention.groups)
    assert all(one.keys.shape[1] <= two.keys.shape[1] for one, two in pairwise(pack.attention.groups))
