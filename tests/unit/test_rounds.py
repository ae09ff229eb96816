"""Rounds over items: everyone's share, what is kept on the way, and what is passed over."""

import dataclasses
from dataclasses import dataclass, field

import pytest
import torch

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.steps.kept_sums import KeptSums
from minitron_nemo.steps.rounds import FILE, SAVES, Rounds


@dataclass
class Sum:
    values: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def merged(self):
        return self.values

    def restore(self, total):
        self.values += total


def gone_through(count, rounds, *, stop_at=None, part="part"):
    total, seen = Sum(), []

    def work(numbers):
        if len(seen) == stop_at:
            raise InterruptedError
        seen.append(list(numbers))
        total.values += torch.tensor([0.1 * sum(numbers), 1 / 3])

    rounds.go(count, part, unit="item", sums=[total], work=work)
    return total.values.tolist(), seen


@pytest.mark.parametrize(("count", "dp", "size"), [(12, 2, 3), (7, 2, 2), (1, 3, 2), (40, 1, 1)])
def test_every_item_is_somebodys_once(count, dp, size):
    seen = []
    for rank in range(dp):
        rounds = Rounds(Groups(layout=Layout(dp=dp), dp_rank=rank), size)
        _, mine = gone_through(count, rounds)
        assert all(0 < len(numbers) <= size for numbers in mine)
        seen += [number for numbers in mine for number in numbers]
    assert sorted(seen) == list(range(count))


def test_what_was_kept_is_gone_on_from_and_is_the_same_to_the_last_bit(tmp_path):
    kept = KeptSums(tmp_path / "job", "f" * 64)
    whole, all_seen = gone_through(40, Rounds(Groups(), 1))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InterruptedError):
        gone_through(40, Rounds(Groups(), 1, kept), stop_at=33)
    again, seen = gone_through(40, Rounds(Groups(), 1, kept))
    every = 40 // SAVES
    assert seen == all_seen[33 // every * every :]
    assert again == whole
    other = dataclasses.replace(kept, fingerprint="f" * 16 + "g" * 48)
    assert len(gone_through(40, Rounds(Groups(), 1, other))[1]) == 40, "another search, in the same folder"
    kept.remove()
    assert not list(tmp_path.iterdir())


def test_parts_are_kept_apart_and_only_the_newest_sums_of_each(tmp_path):
    kept = KeptSums(tmp_path, "f")
    for part in ("part", "part_00000003", "[p]art"):
        gone_through(5, Rounds(Groups(), 1, kept), part=part)
    found = [path.name for path in sorted(kept.folder.iterdir()) if path.is_dir()]
    assert found == ["[p]art_00000005", "part_00000003_00000005", "part_00000005"]
    assert gone_through(5, Rounds(Groups(), 1, kept)) == (gone_through(5, Rounds(Groups(), 1))[0], [])


def test_damaged_sums_are_passed_over_and_those_of_other_shapes_refused(tmp_path, caplog):
    kept = KeptSums(tmp_path, "f")
    gone_through(4, Rounds(Groups(), 1, kept))
    file = kept.folder / "part_00000004" / FILE
    right = file.read_bytes()
    file.write_bytes(right[:-8] + b"damaged!")
    assert len(gone_through(4, Rounds(Groups(), 1, kept))[1]) == 4
    assert "its SHA-256 is not that of manifest.json; trying older sums" in caplog.text
    with pytest.raises(UserError, match=r"part_00000004: .*delete it to begin anew$"):
        Rounds(Groups(), 1, kept).go(4, "part", unit="item", sums=[], work=lambda _: None)
