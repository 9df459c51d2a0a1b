import pytest
import torch

from lora_engine.dropout import keep_mask, row_keys

EXAMPLES = torch.arange(64).repeat_interleave(32)
POSITIONS = torch.arange(32).repeat(64)


def mask(seed: int = 0, step: int = 0, layer: int = 0, dropout: float = 0.1) -> torch.Tensor:
    return keep_mask(row_keys(seed, step, EXAMPLES, POSITIONS), layer, 128, dropout, torch.float32)


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5])
def test_the_share_that_is_dropped_and_the_scale_of_the_rest(dropout: float) -> None:
    found = mask(dropout=dropout)
    assert float((found == 0).double().mean()) == pytest.approx(dropout, abs=0.003)
    assert found.unique().tolist() == [0.0, pytest.approx(1 / (1 - dropout))]
    # No row and no column is dropped more than chance allows (six standard deviations).
    for axis, count in ((0, 2048), (1, 128)):
        rates = (found == 0).double().mean(axis)
        assert float((rates - dropout).abs().max()) < 6 * (dropout * (1 - dropout) / count) ** 0.5


def test_masks_of_another_seed_step_layer_example_or_position_are_unrelated() -> None:
    first = mask() == 0
    others = [mask(seed=1), mask(step=1), mask(layer=1), mask().roll(32, 0), mask().roll(1, 0), mask().roll(1, 1)]
    for other in others:
        both = float((first & (other == 0)).double().mean())
        assert both == pytest.approx(0.01, abs=0.002)


def test_a_mask_depends_on_where_it_applies_and_on_nothing_else() -> None:
    some = torch.tensor([5, 700, 2000])
    keys = row_keys(0, 3, EXAMPLES[some], POSITIONS[some])
    assert torch.equal(keep_mask(keys, 2, 128, 0.1, torch.float32), mask(step=3, layer=2)[some])
    assert not torch.equal(mask(), mask(step=1))


def test_the_hash_never_changes() -> None:
    """In plain integers: another hash would make old checkpoints resume into another training."""

    def mix(value: int) -> int:
        value &= 0xFFFFFFFF
        value = (value ^ value >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        value = (value ^ value >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return value ^ value >> 16

    start = mix(1 + 0x9E3779B9 * 3)
    expected = [mix(mix(start ^ 4) + 0x85EBCA6B * (position + 1)) for position in range(3)]
    keys = row_keys(1, 2, torch.tensor([4, 4, 4]), torch.arange(3))
    assert keys.tolist() == expected
    columns = [mix(feature + 0x9E3779B9 * 6) for feature in range(8)]
    kept = [[mix(key + column) >= 2**31 for column in columns] for key in expected]
    assert (keep_mask(keys, 5, 8, 0.5, torch.float32) > 0).tolist() == kept
