"""Cutting one tensor: what is whole is not copied, what does not fit is refused by the tensor's name."""

import dataclasses
import math

import pytest
import torch
from random_scores import random_scores
from torch import Tensor

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import ShapedSource, stream
from minitron_nemo.errors import UserError
from minitron_nemo.pruning import cut as cut_module
from minitron_nemo.pruning.cut import PrunedSource, kept_of_each, select
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.plan import PruningPlan, identity
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import shrink
from minitron_nemo.shape.packing import Plain
from minitron_nemo.shape.tensors import FFN, HIDDEN, LogicalTensor, TensorRow, logical_tensors

ARCH = ModelArch(num_layers=4, hidden_size=6, ffn_hidden_size=8, num_attention_heads=6, num_query_groups=2,
                 kv_channels=4, vocab_size=11, seq_length=8)  # fmt: skip
TARGET = shrink(ARCH, num_layers=3, hidden_size=4, ffn_hidden_size=5, num_attention_heads=4)


class Numbered(ShapedSource):
    """Every element of every tensor another number; weights bfloat16, norms float32."""

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if "norm" in name else torch.bfloat16

    def read(self, name: str, box: Box | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(self.names().index(name))
        tensor = torch.randn(self.shape(name), generator=generator).to(self.dtype(name))
        return tensor if box is None else tensor[box.slices()]


def some_plan(seed: int = 0) -> PruningPlan:
    return make_plan(random_scores(ARCH, seed=seed), TARGET)


def test_a_pruned_model_is_a_source_of_the_target_shape():
    source = PrunedSource(Numbered(ARCH), some_plan())
    assert source.arch == TARGET
    tensors = dict(stream(source))
    assert list(tensors) == source.names() == list(logical_tensors(TARGET))
    for name, tensor in tensors.items():
        assert tuple(tensor.shape) == source.shape(name) == logical_tensors(TARGET)[name].shape(TARGET)
        assert tensor.dtype == source.dtype(name) == (torch.float32 if "norm" in name else torch.bfloat16)


@pytest.mark.parametrize("seed", range(3))
def test_layers_are_counted_anew_and_rows_and_columns_are_those_of_the_plan(seed):
    plan, source = some_plan(seed), Numbered(ARCH)
    pruned = PrunedSource(source, plan)
    for place, layer in enumerate(plan.layers):
        whole = source.read(f"decoder.layers.{layer}.mlp.linear_fc2.weight")
        expected = whole[list(plan.units("hidden_size"))][:, list(plan.units("ffn_hidden_size", place))]
        assert torch.equal(pruned.read(f"decoder.layers.{place}.mlp.linear_fc2.weight"), expected)
    assert torch.equal(
        pruned.read("output_layer.weight"), source.read("output_layer.weight")[:, list(plan.units("hidden_size"))]
    )


def test_a_box_is_that_part_of_the_cut_tensor():
    pruned = PrunedSource(Numbered(ARCH), some_plan())
    for name in pruned.names():
        shape = pruned.shape(name)
        box = Box(tuple(size // 3 for size in shape), tuple(size // 2 for size in shape))
        assert torch.equal(pruned.read(name, box), pruned.read(name)[box.slices()])


def test_a_tensor_is_cut_in_blocks_of_rows_of_the_source(monkeypatch):
    """However small the blocks, the result is that of one; and no read is larger than a block or one row."""
    plan, source, asked = some_plan(1), Numbered(ARCH), []
    expected = dict(stream(PrunedSource(source, plan)))
    read = source.read
    monkeypatch.setattr(source, "read", lambda name, box=None: asked.append((name, box)) or read(name, box))
    for size in (1, 40, 100):
        monkeypatch.setattr(cut_module, "BLOCK_BYTES", size)
        asked.clear()
        for name, tensor in stream(PrunedSource(source, plan)):
            assert torch.equal(tensor, expected[name]), (name, size)
        for name, box in asked:
            row = source.dtype(name).itemsize * math.prod(box.size[1:])
            assert box.size[0] * row <= max(size, row), (name, box, size)


def test_rows_that_go_at_the_ends_are_not_read(monkeypatch):
    target = shrink(ARCH, ffn_hidden_size=2)
    keep = identity(target).keep | {"ffn_hidden_size": ((3, 5),) * 4}
    source, asked = Numbered(ARCH), []
    read = source.read
    monkeypatch.setattr(source, "read", lambda name, box=None: asked.append(box) or read(name, box))
    PrunedSource(source, PruningPlan(ARCH, target, keep)).read("decoder.layers.0.mlp.linear_fc1.weight")
    assert asked == [Box((3, 0), (11, 6))], "rows 3, 5 of the gate, 11 and 13 of what it gates"


def test_a_stream_ends_with_the_tensor_that_cannot_be_read_and_not_before():
    class Broken(Numbered):
        def read(self, name, box=None):
            if name == self.names()[2]:
                raise UserError("cut short")
            return super().read(name, box)

    source = Broken(ARCH)
    tensors = stream(source)
    for expected in source.names()[:2]:
        name, tensor = next(tensors)
        assert name == expected
        assert torch.equal(tensor, source.read(expected))
    with pytest.raises(UserError, match="cut short"):
        next(tensors)


def test_a_source_of_another_shape_than_the_plans_is_refused():
    with pytest.raises(UserError, match="made for hidden_size=6, the checkpoint is hidden_size=12"):
        PrunedSource(Numbered(dataclasses.replace(ARCH, hidden_size=12)), some_plan())


def test_a_dimension_that_stays_whole_is_not_copied():
    table = logical_tensors(ARCH)
    for name, tensor in table.items():
        whole = torch.ones(tensor.shape(ARCH))
        assert select(whole, kept_of_each(tensor, plan=identity(ARCH))) is whole, name
    narrow = make_plan(random_scores(ARCH), shrink(ARCH, ffn_hidden_size=5))
    embedding = torch.ones(11, 6)
    assert select(embedding, kept_of_each(table["embedding.word_embeddings.weight"], plan=narrow)) is embedding


@pytest.mark.parametrize("axis", ["kv_channels", "num_query_groups"])
def test_a_dimension_that_no_plan_prunes_stays_whole(axis):
    row = TensorRow("decoder.layers.self_attention.q_layernorm.weight", (HIDDEN, Plain(axis)), per_layer=True)
    tensor = LogicalTensor(row, 1)
    values, plan = torch.randn(tensor.shape(ARCH)), some_plan()
    kept = select(values, kept_of_each(tensor, plan=plan))
    assert torch.equal(kept, values[list(plan.units("hidden_size"))])


def test_layers_are_dropped_as_tensors_and_never_as_elements_of_one():
    stranger = LogicalTensor(TensorRow("stacked.weight", (Plain("num_layers"),), per_layer=False))
    with pytest.raises(ValueError, match=r"stacked.weight: cut to \[4\], the plan's target has \[3\]"):
        kept_of_each(stranger, plan=some_plan())


def test_an_axis_chosen_per_layer_is_refused_in_a_tensor_that_has_no_layer():
    stranger = LogicalTensor(TensorRow("shared.weight", (HIDDEN, FFN), per_layer=False))
    with pytest.raises(ValueError, match="shared.weight: dimension 1: every layer keeps its own .*'ffn_hidden_size'"):
        kept_of_each(stranger, plan=some_plan())
