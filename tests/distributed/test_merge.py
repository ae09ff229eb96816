"""Importance over real gloo ranks equals importance in one process, in every layout."""

import itertools
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from fake_megatron import ARCH, FakeModel, random_tapes, select_samples
from torch import distributed
from torch.multiprocessing import spawn

from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.distributed.spread import Spread, by_layer, merge
from minitron_nemo.importance.hooks import listening

WORLD = 4
SAMPLES = 6
# tensor parallel, pipeline parallel, data parallel, sequence parallel
LAYOUTS = [(4, 1, 1, False), (4, 1, 1, True), (1, 4, 1, False), (1, 1, 4, False), (2, 2, 1, True), (2, 1, 2, True)]
AGGREGATIONS = [("mean", "l2"), ("l2", "variance"), ("variance", "mean")]
AXES = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_layers")


def place(rank: int, *, tp: int, dp: int) -> tuple[int, int, int]:
    """(tp, pp, dp) coordinates; tensor parallel fastest, pipeline slowest."""
    return rank % tp, rank // (tp * dp), rank // tp % dp


def groups_of(rank: int, layout: Layout) -> Groups:
    mine, tp, dp = {}, layout.tp, layout.dp
    for i, axis in enumerate(("tp", "pp", "dp")):
        lines: dict[tuple, list[int]] = {}
        for other in range(WORLD):
            at = list(place(other, tp=tp, dp=dp))
            at[i] = -1
            lines.setdefault(tuple(at), []).append(other)
        for ranks in lines.values():
            group = distributed.new_group(ranks)  # every rank must take part in making every group
            if rank in ranks and len(ranks) > 1:
                mine[axis] = group
    tp_rank, pp_rank, dp_rank = place(rank, tp=tp, dp=dp)
    return Groups(layout=layout, **mine, rank=rank, tp_rank=tp_rank, pp_rank=pp_rank, dp_rank=dp_rank)


def score(tapes, *, numbers, groups, sequence, batches):
    model = FakeModel(numbers)
    with listening(model, arch=ARCH, sequence_aggregation=sequence, groups=groups) as statistics:
        for sample in range(tapes[0].before.shape[1]):
            model(select_samples(tapes, slice(sample, sample + 1)))
    return [statistics.finish(batch) for batch in batches]


def check_layout(rank: int, layout: tuple[int, int, int, bool]) -> None:
    tp, pp, dp, sequence_parallel = layout
    groups = groups_of(rank, Layout(tp=tp, pp=pp, dp=dp, sequence_parallel=sequence_parallel))
    tapes = random_tapes(ARCH, seq=8, batch=SAMPLES, seed=7)
    # Six samples over four ranks: some ranks hear two, some one.
    samples = slice(groups.dp_rank, None, dp)
    mine = [
        tape.shard(rank=groups.tp_rank, tp=tp, sequence_parallel=sequence_parallel)
        for tape in select_samples(tapes, samples)
    ]
    # Uneven stages: the first takes what is left over.
    bounds = [0, *(ARCH.num_layers - pp + 1 + stage for stage in range(pp))]
    numbers = list(range(bounds[groups.pp_rank] + 1, bounds[groups.pp_rank + 1] + 1))
    for sequence, batch in AGGREGATIONS:
        (ours,) = score(mine, numbers=numbers, groups=groups, sequence=sequence, batches=[batch])
        everything = list(range(1, ARCH.num_layers + 1))
        (alone,) = score(tapes, numbers=everything, groups=None, sequence=sequence, batches=[batch])
        for axis in AXES:
            a, b = ours[axis], alone[axis]
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), f"{layout} {axis}: {a} is not {b}"
            everywhere = merge(a[None].contiguous(), Spread.SHARDED, distributed.group.WORLD)
            assert all(torch.equal(piece, a[None]) for piece in everywhere.chunk(WORLD, dim=-1)), f"{layout} {axis}"
        assert (ours.num_samples, ours.seq_length) == (SAMPLES, 8), layout


def check_merge(rank: int) -> None:
    world = distributed.group.WORLD
    mine = torch.full((2, 3), float(rank))
    assert torch.equal(merge(mine, Spread.REPLICATED, world), mine)
    assert torch.equal(merge(mine, Spread.PARTIAL, world), torch.full((2, 3), 6.0))
    assert merge(mine, Spread.SHARDED, world).tolist() == [[0.0] * 3 + [1.0] * 3 + [2.0] * 3 + [3.0] * 3] * 2
    transposed = torch.arange(6.0).view(3, 2).t()  # not contiguous
    assert torch.equal(merge(transposed, Spread.PARTIAL, world), transposed * WORLD)
    # Summands that cancel only in one order: rank order must give the same bits everywhere.
    odd = torch.tensor([[1e16, 1.0, -1e16, 1.0][rank]], dtype=torch.float64)
    assert merge(odd, Spread.PARTIAL, world).item() == ((1e16 + 1.0) - 1e16) + 1.0  # not sum(): Python 3.12 compensates
    table = by_layer(torch.full((1, 2), float(rank + 1)), [rank], num_layers=WORLD, group=world)
    assert table.tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0], [4.0, 4.0]]


def run_rank(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    try:
        check_merge(rank)
        for layout in LAYOUTS:
            check_layout(rank, layout)
    finally:
        distributed.destroy_process_group()


def test_importance_does_not_depend_on_the_layout_and_ends_equal_on_every_rank(tmp_path: Path):
    assert all(tp * pp * dp == WORLD for tp, pp, dp, _ in LAYOUTS)
    spawn(run_rank, args=((tmp_path / "rendezvous").as_uri(),), nprocs=WORLD)


@pytest.mark.parametrize(("tp", "dp"), list(itertools.product((1, 2, 4), (1, 2))))
def test_places_are_distinct(tp, dp):
    if tp * dp <= WORLD:
        assert len({place(rank, tp=tp, dp=dp) for rank in range(WORLD)}) == WORLD
