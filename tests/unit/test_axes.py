"""The registry of axes: which sizes and which units may be kept."""

import dataclasses
import re

import pytest

from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES, FIRST_AXES, blocks_first, shrink

SOURCE = ModelArch(num_layers=3, hidden_size=6, ffn_hidden_size=8, num_attention_heads=8, num_query_groups=4,
                   kv_channels=2, vocab_size=16, seq_length=32)  # fmt: skip
FFN, HEADS = AXES["ffn_hidden_size"], AXES["num_attention_heads"]


def test_every_axis_is_a_size_of_a_shape_and_is_listed_under_its_name():
    assert {name: axis.size(SOURCE) for name, axis in AXES.items()} == {name: getattr(SOURCE, name) for name in AXES}
    assert all(name == axis.name for name, axis in AXES.items())
    assert set(FIRST_AXES) <= set(AXES)
    assert [name for name, axis in AXES.items() if axis.is_layers] == ["num_layers"]


@pytest.mark.parametrize("name", AXES)
def test_every_axis_can_be_left_as_it_is_and_cannot_grow_or_vanish(name):
    size = getattr(SOURCE, name)
    assert shrink(SOURCE, **{name: size}) == shrink(SOURCE, **{name: None}) == shrink(SOURCE) == SOURCE
    for refused in (0, -1, size * 2):
        with pytest.raises(UserError, match=rf"{name}={refused}: pruning needs 1\.\.{size}, the size of the source"):
            shrink(SOURCE, **{name: refused})


def test_a_smaller_shape_differs_in_nothing_else():
    sizes = dict(num_layers=2, hidden_size=5, ffn_hidden_size=3, num_attention_heads=4)
    assert shrink(SOURCE, **sizes) == dataclasses.replace(SOURCE, **sizes)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7])
def test_heads_shrink_evenly_over_their_groups(heads):
    with pytest.raises(UserError, match=f"num_attention_heads={heads}: .* multiple of num_query_groups=4"):
        shrink(SOURCE, num_attention_heads=heads)


@pytest.mark.parametrize("name", ["seq_length", "kv_channels", "hiden_size"])
def test_what_is_no_axis_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"{name}: not a prunable axis; there are num_layers, hidden_size"):
        shrink(SOURCE, **{name: 1})


UNITS = {
    "too few": ((0, 1), r"keeps 2 units, the target has 3"),
    "too many": ((0, 1, 2, 3), r"keeps 4 units, the target has 3"),
    "negative": ((-1, 0, 1), r"units of 0\.\.7 in ascending order"),
    "too large": ((0, 1, 8), r"units of 0\.\.7 in ascending order"),
    "twice": ((0, 1, 1), "ascending order, each once"),
    "descending": ((2, 1, 0), "ascending order"),
}


@pytest.mark.parametrize("kind", UNITS)
def test_units_must_be_those_of_the_source_ascending_and_as_many_as_the_target_has(kind):
    target = shrink(SOURCE, ffn_hidden_size=3)
    FFN.check_units((0, 5, 7), source=SOURCE, target=target)
    units, message = UNITS[kind]
    with pytest.raises(UserError, match=f"plan: ffn_hidden_size .*{message}"):
        FFN.check_units(units, source=SOURCE, target=target)


def test_every_block_keeps_as_many_units():
    target = shrink(SOURCE, num_attention_heads=4)
    HEADS.check_units((0, 3, 4, 7), source=SOURCE, target=target)
    message = re.escape("keeps [0, 1, 4, 7], but each of the 4 num_query_groups, which hold 2, must keep 1")
    with pytest.raises(UserError, match=message):
        HEADS.check_units((0, 1, 4, 7), source=SOURCE, target=target)


def test_units_of_a_block_that_goes_go_with_it():
    target = dataclasses.replace(SOURCE, num_attention_heads=4, num_query_groups=2)
    HEADS.check_units((2, 3, 6, 7), source=SOURCE, target=target, within=(1, 3))
    for units in ((0, 1, 6, 7), (0, 2, 4, 6)):
        with pytest.raises(UserError, match="each of the 2 num_query_groups, which hold 2, must keep 2"):
            HEADS.check_units(units, source=SOURCE, target=target, within=(1, 3))


def test_fewer_blocks_hold_fewer_units():
    for heads, groups in ((6, 3), (3, 3), (4, 2), (1, 1)):
        target = shrink(SOURCE, num_attention_heads=heads, num_query_groups=groups)
        assert (target.num_attention_heads, target.num_query_groups) == (heads, groups)
    with pytest.raises(UserError, match=r"num_attention_heads=8: pruning needs 1\.\.4, what 2 num_query_groups hold"):
        shrink(SOURCE, num_query_groups=2)
    with pytest.raises(UserError, match="num_attention_heads=4: .* multiple of num_query_groups=3"):
        shrink(SOURCE, num_attention_heads=4, num_query_groups=3)


def test_blocks_come_before_what_they_hold():
    order = [axis.name for axis in blocks_first()]
    assert sorted(order) == sorted(AXES)
    assert order.index("num_query_groups") < order.index("num_attention_heads")
