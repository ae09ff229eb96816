"""Rounds over items: everyone's share, what is kept on the way, and what is passed over."""

import json
from dataclasses import dataclass, field

import pytest
import torch

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.steps.partial import SAVES, Rounds


@dataclass
class Sum:
    values: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def merged(self):
        return self.values

    def restore(self, total):
        self.values += total


def gone_through(count, rounds, *, stop_at=None):
    total, seen = Sum(), []

    def work(numbers):
        if len(seen) == stop_at:
            raise InterruptedError
        seen.append(list(numbers))
        total.values += torch.tensor([0.1 * sum(numbers), 1 / 3])

    rounds.go(count, "part", unit="item", sums=[total], work=work)
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
    whole, all_seen = gone_through(40, Rounds(Groups(), 1))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InterruptedError):
        gone_through(40, Rounds(Groups(), 1, folder=tmp_path, fingerprint="f"), stop_at=33)
    again, seen = gone_through(40, Rounds(Groups(), 1, folder=tmp_path, fingerprint="f"))
    every = 40 // SAVES
    assert seen == all_seen[33 // every * every :]
    assert again == whole
    assert len(gone_through(40, Rounds(Groups(), 1, folder=tmp_path, fingerprint="other"))[1]) == 40


@pytest.mark.parametrize("text", ["{", '{"fingerprint": "f"}', '{"fingerprint": "f", "done": 1, "sums": [[1], [2]]}',
                                  '{"fingerprint": "f", "done": 1, "sums": [[1, 2, 3]]}'])  # fmt: skip
def test_a_damaged_file_is_refused_by_name(text, tmp_path):
    (tmp_path / "part.json").write_text(text)
    with pytest.raises(UserError, match=r"part.json: .*delete it to begin anew$"):
        gone_through(4, Rounds(Groups(), 1, folder=tmp_path, fingerprint="f"))


def test_numbers_are_kept_as_they_are(tmp_path):
    gone_through(3, Rounds(Groups(), 1, folder=tmp_path, fingerprint="f"))
    record = json.loads((tmp_path / "part.json").read_text())
    assert record["done"] == 3
    assert record["sums"] == [gone_through(3, Rounds(Groups(), 1))[0]]
