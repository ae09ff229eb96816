"""Every packing, against an independent way of saying which element belongs to which unit."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.packing import Gated, GroupedQuery, Heads, Packing, Plain
from minitron_nemo.shape.tensors import FFN, FFN_GATED, HEADS, HIDDEN, QKV, VOCAB, tensor_table

# groups, heads per group, channels, ffn
SHAPES = [(1, 1, 1, 1), (1, 4, 3, 5), (4, 1, 2, 8), (2, 3, 4, 6), (3, 2, 1, 7)]
DIMS = {"hidden": HIDDEN, "vocabulary": VOCAB, "ffn": FFN, "gated ffn": FFN_GATED, "heads": HEADS, "qkv": QKV}
Label = tuple[str, int, int, int]  # projection, group, head or unit, channel


def arch_of(groups: int, heads: int, channels: int, ffn: int, **fields) -> ModelArch:
    return ModelArch(num_layers=2, hidden_size=6, ffn_hidden_size=ffn, num_attention_heads=groups * heads,
                     num_query_groups=groups, kv_channels=channels, vocab_size=11, seq_length=8, **fields)  # fmt: skip


def labels(dim: Packing, arch: ModelArch) -> list[Label]:
    """What each element of a dimension is, in Megatron's order."""
    if isinstance(dim, Plain):
        return [("unit", 0, unit, 0) for unit in range(getattr(arch, dim.axis))]
    if isinstance(dim, Gated):
        return [(side, 0, unit, 0) for side in ("gate", "up") for unit in range(getattr(arch, dim.axis))]
    found: list[Label] = []
    for group in range(arch.num_query_groups):
        for head in range(arch.heads_per_group):
            found += [("query", group, group * arch.heads_per_group + head, c) for c in range(arch.kv_channels)]
        if isinstance(dim, GroupedQuery):
            found += [(side, group, 0, c) for side in ("key", "value") for c in range(arch.kv_channels)]
    return found


def stays(label: Label, kept: dict[str, set[int]]) -> bool:
    side, group, unit, _ = label
    if group not in kept.get("num_query_groups", {group}):
        return False
    own = [units for axis, units in kept.items() if axis != "num_query_groups"]
    return side in ("key", "value") or all(unit in units for units in own)


def some(count: int, *, seed: int) -> set[int]:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.6
    return set(drawn.nonzero().flatten().tolist())


def as_kept(kept: dict[str, set[int]]) -> dict[str, Tensor]:
    return {axis: torch.tensor(sorted(units), dtype=torch.int64) for axis, units in kept.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DIMS)
def test_a_dimension_is_as_long_as_it_has_elements(shape, name):
    arch = arch_of(*shape)
    assert DIMS[name].size(arch) == len(labels(DIMS[name], arch))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("seed", range(4))
def test_the_elements_kept_are_those_of_kept_units_and_of_none(shape, name, seed):
    dim, arch = DIMS[name], arch_of(*shape)
    axis = dim.axes[-1]
    kept = {axis: some(getattr(arch, axis), seed=seed)}
    expected = [element for element, label in enumerate(labels(dim, arch)) if stays(label, kept)]
    elements = dim.keep(as_kept(kept), arch)
    assert elements is not None
    assert elements.dtype == torch.int64
    assert elements.tolist() == expected


@pytest.mark.parametrize("name", DIMS)
def test_an_axis_that_is_not_named_stays_whole(name):
    dim, arch = DIMS[name], arch_of(2, 3, 4, 6)
    assert dim.keep({}, arch) is None
    stranger = {"hidden_size", "vocab_size"} - set(dim.axes)
    assert dim.keep({axis: torch.tensor([0]) for axis in stranger}, arch) is None


@pytest.mark.parametrize("shape", SHAPES)
def test_keeping_every_unit_keeps_every_element_in_place(shape):
    for arch in (arch_of(*shape), arch_of(*shape, activation="squared_relu")):
        for dim in {dim for row in tensor_table(arch) for dim in row.dims}:
            everything = {axis: torch.arange(getattr(arch, axis)) for axis in dim.axes}
            elements = dim.keep(everything, arch)
            assert elements is not None
            assert elements.tolist() == list(range(dim.size(arch)))


@pytest.mark.parametrize("dim", [HEADS, QKV], ids=["heads", "qkv"])
@pytest.mark.parametrize("shape", [(4, 3, 2, 1), (3, 1, 4, 1), (5, 2, 1, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_a_query_group_goes_with_its_key_its_value_and_its_heads(dim, shape, seed):
    arch = arch_of(*shape)
    groups = some(arch.num_query_groups, seed=seed) | {0}
    heads = some(arch.num_attention_heads, seed=seed + 10)
    of_kept_groups = {head for head in heads if head // arch.heads_per_group in groups}
    for kept in (
        {"num_query_groups": groups},
        {"num_query_groups": groups, "num_attention_heads": heads},
        {"num_query_groups": groups, "num_attention_heads": of_kept_groups},
    ):
        expected = [element for element, label in enumerate(labels(dim, arch)) if stays(label, kept)]
        elements = dim.keep(as_kept(kept), arch)
        assert elements is not None
        assert elements.tolist() == expected


@pytest.mark.parametrize("dim", [HEADS, QKV], ids=["heads", "qkv"])
def test_what_is_left_of_the_groups_lies_as_the_smaller_model_needs_it(dim):
    arch = arch_of(4, 3, 2, 1)
    smaller = dataclasses.replace(arch, num_query_groups=2, num_attention_heads=4)
    groups, heads = [1, 3], [3, 5, 9, 10]
    elements = dim.keep({"num_query_groups": torch.tensor(groups), "num_attention_heads": torch.tensor(heads)}, arch)
    assert elements is not None
    renamed = [
        (side, groups.index(group), heads.index(unit) if side == "query" else 0, channel)
        for side, group, unit, channel in (labels(dim, arch)[element] for element in elements.tolist())
    ]
    assert renamed == labels(dim, smaller)


@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_pieces_of_all_ranks_cover_the_dimension_once_and_each_rank_holds_whole_units(name, tp):
    dim = DIMS[name]
    arch = dataclasses.replace(arch_of(4, 3, 2, 12), hidden_size=8, vocab_size=16)
    local_size = dim.size(arch) // tp
    covered: list[int] = []
    axis = dim.axes[0]
    share = getattr(arch, axis) // tp
    for rank in range(tp):
        pieces = dim.tensor_parallel_pieces(local_size, rank=rank, tp=tp)
        local = [at for piece in pieces for at in range(piece.local, piece.local + piece.length)]
        assert sorted(local) == list(range(local_size))
        mine = [at for piece in pieces for at in range(piece.start, piece.start + piece.length)]
        elements = dim.keep({axis: torch.arange(rank * share, (rank + 1) * share)}, arch)
        assert elements is not None
        assert mine == elements.tolist()
        covered += mine
    assert sorted(covered) == list(range(dim.size(arch)))


def test_padding_lies_behind_the_words():
    held = [VOCAB.tensor_parallel_pieces(8, rank=rank, tp=2) for rank in range(2)]
    assert [[(piece.local, piece.start, piece.length) for piece in pieces] for pieces in held] == [
        [(0, 0, 8)],
        [(0, 8, 8)],
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DIMS)
@pytest.mark.parametrize("rest", [(), (3,), (2, 3)])
def test_hugging_faces_tensors_are_packed_and_unpacked_without_loss(shape, name, rest):
    dim, arch = DIMS[name], arch_of(*shape)
    packed = torch.randn(dim.size(arch), *rest, generator=torch.Generator().manual_seed(0))
    parts = dim.to_hf(packed, arch)
    assert [len(part) for part in parts] == dim.hf_sizes(arch)
    assert torch.equal(dim.from_hf(parts, arch), packed)
    again = dim.to_hf(dim.from_hf(parts, arch), arch)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dim", "sides"), [(FFN_GATED, ("gate", "up")), (QKV, ("query", "key", "value"))])
def test_each_element_comes_from_its_own_row_of_its_own_hugging_face_tensor(shape, dim, sides):
    arch = arch_of(*shape)
    parts = [torch.arange(size) + 1000 * side for side, size in enumerate(dim.hf_sizes(arch))]

    def source(label: Label) -> int:
        side, group, unit, channel = label
        head = unit if side == "query" else group
        row = unit if side in ("gate", "up") else head * arch.kv_channels + channel
        return 1000 * sides.index(side) + row

    assert dim.from_hf(parts, arch).tolist() == [source(label) for label in labels(dim, arch)]


def test_every_packing_of_the_table_is_tested_here():
    tables = [tensor_table(arch_of(2, 3, 4, 6, activation=kind)) for kind in ("swiglu", "squared_relu")]
    used = {type(dim) for row in itertools.chain(*tables) for dim in row.dims}
    assert used == {type(dim) for dim in DIMS.values()} == {Plain, Gated, Heads, GroupedQuery}
