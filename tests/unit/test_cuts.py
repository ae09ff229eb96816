"""Every packing, against an independent way of saying which element belongs to which unit."""

import pytest
import torch

from minitron_nemo.arch import ModelArch
from minitron_nemo.parameters import FFN, FFN_GATED, HEADS, HIDDEN, QKV, Dim, Parameter, parameters
from minitron_nemo.pruning.cuts import PACKINGS, cut, elements_to_keep
from minitron_nemo.pruning.plan import identity

# groups, heads per group, channels, ffn
SHAPES = [(1, 1, 1, 1), (1, 4, 3, 5), (4, 1, 2, 8), (2, 3, 4, 6), (3, 2, 1, 7)]


def arch_of(groups: int, heads: int, channels: int, ffn: int, **fields) -> ModelArch:
    return ModelArch(num_layers=2, hidden_size=6, ffn_hidden_size=ffn, num_attention_heads=groups * heads,
                     num_query_groups=groups, kv_channels=channels, vocab_size=11, seq_length=8, **fields)  # fmt: skip


def owners(dim: Dim, arch: ModelArch) -> list[int | None]:
    """The unit that owns each element of a dimension; None for a key or value, which belongs to none."""
    if dim.packing == "plain":
        return list(range(getattr(arch, dim.axis)))
    if dim.packing == "gated":
        return [*range(arch.ffn_hidden_size), *range(arch.ffn_hidden_size)]
    heads = range(arch.num_attention_heads)
    if dim.packing == "heads":
        return [head for head in heads for _ in range(arch.kv_channels)]
    rows: list[int | None] = []
    for group in range(arch.num_query_groups):
        members = [head for head in heads if head // arch.heads_per_group == group]
        rows += [owner for owner in [*members, None, None] for _ in range(arch.kv_channels)]
    return rows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [HIDDEN, FFN, FFN_GATED, HEADS, QKV], ids=lambda dim: f"{dim.axis}-{dim.packing}")
@pytest.mark.parametrize("seed", range(4))
def test_the_elements_kept_are_those_of_kept_units_and_of_none(shape, dim, seed):
    arch = arch_of(*shape)
    units = getattr(arch, dim.axis)
    kept = torch.rand(units, generator=torch.Generator().manual_seed(seed)) < 0.6
    keep = kept.nonzero().flatten()
    owner = owners(dim, arch)
    assert len(owner) == dim.size(arch)
    expected = [element for element, unit in enumerate(owner) if unit is None or kept[unit]]
    assert elements_to_keep(dim, keep, arch=arch).tolist() == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_keeping_every_unit_keeps_every_element_in_place(shape):
    arch = arch_of(*shape)
    for parameter in [*parameters(arch), *parameters(arch_of(*shape, activation="squared_relu"))]:
        for dim in parameter.dims:
            everything = torch.arange(getattr(arch, dim.axis))
            assert elements_to_keep(dim, everything, arch=arch).tolist() == list(range(dim.size(arch)))


def test_every_packing_of_the_table_has_a_cut():
    tables = [parameters(arch_of(2, 3, 4, 6, activation=kind)) for kind in ("swiglu", "squared_relu")]
    assert {dim.packing for table in tables for row in table for dim in row.dims} == set(PACKINGS)


def test_an_unknown_packing_is_refused_by_name():
    with pytest.raises(ValueError, match="'interleaved' of ffn_hidden_size"):
        elements_to_keep(Dim("ffn_hidden_size", "interleaved"), torch.arange(2), arch=arch_of(1, 1, 1, 4))


@pytest.mark.parametrize("axis", ["kv_channels", "num_layers", "num_query_groups"])
def test_a_dimension_that_no_plan_covers_is_refused_with_the_parameters_name(axis):
    arch = arch_of(2, 3, 4, 6)
    stranger = Parameter("decoder.layers.self_attention.q_layernorm.weight", (HIDDEN, Dim(axis)), per_layer=True)
    with pytest.raises(ValueError, match=f"q_layernorm.weight: dimension 1 follows '{axis}'"):
        cut(torch.ones(stranger.shape(arch)), stranger, layer=0, plan=identity(arch))


def test_an_axis_chosen_per_layer_is_refused_in_a_parameter_that_has_no_layer():
    arch = arch_of(2, 3, 4, 6)
    stranger = Parameter("shared.weight", (FFN,), per_layer=False)
    with pytest.raises(ValueError, match="shared.weight"):
        cut(torch.ones(6), stranger, layer=None, plan=identity(arch))


def test_a_tensor_of_another_shape_is_refused_with_both_shapes():
    arch = arch_of(2, 3, 4, 6)
    with pytest.raises(ValueError, match=r"word_embeddings.weight: shape \[16, 6\], the plan's source has \[11, 6\]"):
        cut(torch.ones(16, 6), parameters(arch)[0], layer=None, plan=identity(arch))
