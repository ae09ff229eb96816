"""Values of any length reach every rank as they were."""

import pytest

from minitron_nemo.distributed.layout import Layout
from minitron_nemo.testing import run_layout


def shared(groups):
    own = {"rank": groups.rank, "text": "\u00e9" * (3 + 50 * groups.rank), "nothing": None}
    first = groups.share_json(own)
    # The longest is first the last rank's, then the first's.
    second = groups.share_json("x" * (50 * (groups.layout.world_size - groups.rank)))
    return groups.share_json([first, second])


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_rank_gets_every_ranks_value(ranks):
    wanted = [
        [{"rank": rank, "text": "\u00e9" * (3 + 50 * rank), "nothing": None} for rank in range(ranks)],
        ["x" * (50 * (ranks - rank)) for rank in range(ranks)],
    ]
    assert run_layout(shared, Layout(dp=ranks)) == [wanted] * ranks
