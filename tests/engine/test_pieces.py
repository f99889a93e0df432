"""The checksum by which copies are compared: no single bit and no exchange of values escapes it."""

import pytest
import torch

from flm_scale.engine import pieces
from flm_scale.engine.pieces import checksums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_bit_of_any_value_changes_its_own_checksum_alone(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """In the first chunk of 8 values, in later ones, and in the last and shorter one."""
    monkeypatch.setattr(pieces, "VALUES_PER_CHUNK", 8)
    values, other = torch.randn(3, 9).to(dtype), torch.randn(5).to(dtype)
    before = checksums([values, other])
    for place in range(values.numel()):
        for bit in range(8 * values.element_size()):
            changed = values.clone()
            integers = changed.view(-1).view(torch.int32 if dtype == torch.float32 else torch.int16)
            integers[place] ^= torch.tensor(1).bitwise_left_shift(bit).to(integers.dtype)
            assert (checksums([changed, other]) != before).tolist() == [True, False], (place, bit)
    assert torch.equal(checksums([values.clone(), other]), before)


def test_values_that_changed_places_or_drifted_in_opposite_ways_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "VALUES_PER_CHUNK", 8)
    values = torch.randn(40)
    found = {int(checksums([values])), int(checksums([values.flip(0)])), int(checksums([values.roll(8)]))}
    for place in range(39):
        drifted = values.clone()
        bits = drifted.view(torch.int32)
        bits[place] += 1
        bits[place + 1] -= 1
        found.add(int(checksums([drifted])))
    assert len(found) == 3 + 39
