"""Laws of pruning whole models: identity, composition, shapes, and equality with the masked model."""

import dataclasses
import itertools

import pytest
import torch
from random_scores import random_scores
from reference_model import InMemory, Model, forward, random_model

from minitron_nemo.checkpoint.source import stream
from minitron_nemo.pruning.cut import PrunedSource
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.plan import PruningPlan, identity
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES, shrink
from minitron_nemo.shape.tensors import logical_tensors

# layers, hidden, ffn, query groups, heads per group, kv_channels
SHAPES = [(4, 12, 10, 2, 4, 3), (3, 8, 16, 1, 6, 2), (5, 9, 7, 4, 2, 1)]
KINDS = [("swiglu", "RMSNorm", False), ("squared_relu", "LayerNorm1p", False), ("swiglu", "LayerNorm1p", True)]
CASES = list(itertools.product(SHAPES, KINDS, range(2)))


def arch_of(shape: tuple[int, ...], kind: tuple[str, str, bool]) -> ModelArch:
    layers, hidden, ffn, groups, heads, channels = shape
    activation, normalization, tied = kind
    return ModelArch(num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=groups * heads,
                     num_query_groups=groups, kv_channels=channels, vocab_size=13, seq_length=16, activation=activation,
                     normalization=normalization, share_embeddings_and_output_weights=tied)  # fmt: skip


def smaller(arch: ModelArch, *axes: str) -> ModelArch:
    """A target one step smaller on each axis; heads by one in every group that stays."""
    steps = {"num_layers": 1, "hidden_size": 3, "ffn_hidden_size": 2, "vocab_size": 4}
    sizes = {axis: max(getattr(arch, axis) - steps[axis], steps[axis]) for axis in axes if axis in steps}
    groups = max(arch.num_query_groups - 1, 1) if "num_query_groups" in axes else arch.num_query_groups
    held = arch.heads_per_group - (1 if "num_attention_heads" in axes and arch.heads_per_group > 1 else 0)
    return shrink(arch, **sizes, num_query_groups=groups, num_attention_heads=groups * held)


ALL_AXES = tuple(AXES)


def prune(model: Model, plan: PruningPlan) -> Model:
    return dict(stream(PrunedSource(InMemory(plan.source, model), plan)))


def assert_equal(ours: Model, theirs: Model) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(("shape", "kind", "seed"), CASES)
def test_the_identity_plan_changes_nothing(shape, kind, seed):
    arch = arch_of(shape, kind)
    model = random_model(arch, seed)
    assert_equal(prune(model, identity(arch)), model)


@pytest.mark.parametrize(("shape", "kind", "seed"), CASES)
def test_every_tensor_has_the_shape_the_table_gives_the_target(shape, kind, seed):
    arch = arch_of(shape, kind)
    plan = make_plan(random_scores(arch, seed=seed), smaller(arch, *ALL_AXES))
    pruned = prune(random_model(arch, seed), plan)
    expected = {name: tensor.shape(plan.target) for name, tensor in logical_tensors(plan.target).items()}
    assert {name: tuple(tensor.shape) for name, tensor in pruned.items()} == expected
    assert sum(tensor.numel() for tensor in pruned.values()) == plan.target.num_params()


@pytest.mark.parametrize(("shape", "kind", "seed"), CASES)
def test_pruning_twice_is_pruning_once_by_the_composed_plan(shape, kind, seed):
    arch = arch_of(shape, kind)
    first = make_plan(random_scores(arch, seed=seed), smaller(arch, *ALL_AXES))
    second = make_plan(random_scores(first.target, seed=seed + 50), smaller(first.target, *ALL_AXES))
    model = random_model(arch, seed)
    assert_equal(prune(prune(model, first), second), prune(model, first.then(second)))


@pytest.mark.parametrize(("shape", "kind", "seed"), CASES)
def test_axes_can_be_pruned_one_after_another_in_any_order(shape, kind, seed):
    arch = arch_of(shape, kind)
    scores = random_scores(arch, seed=seed)
    at_once = make_plan(scores, smaller(arch, *ALL_AXES))
    model = random_model(arch, seed)
    # Width first: the layers that go are still there to be cut.
    width = make_plan(scores, smaller(arch, *ALL_AXES[1:]))
    depth = dataclasses.replace(
        identity(width.target),
        target=at_once.target,
        keep=identity(at_once.target).keep | {"num_layers": (at_once.layers,)},
    )
    assert_equal(prune(prune(model, width), depth), prune(model, at_once))


@pytest.mark.parametrize(("shape", "kind", "seed"), CASES)
def test_the_sliced_model_computes_what_the_masked_model_computes(shape, kind, seed):
    arch = arch_of(shape, kind)
    plan = make_plan(
        random_scores(arch, seed=seed), smaller(arch, *(axis for axis in ALL_AXES if axis != "hidden_size"))
    )
    words = torch.tensor(plan.units("vocab_size"))
    model = random_model(arch, seed)
    masked = {name: tensor.clone() for name, tensor in model.items()}
    for layer in range(arch.num_layers):
        names = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
        projection, second = (masked[f"decoder.layers.{layer}.{name}"] for name in names)
        if layer not in plan.layers:
            projection.zero_()
            second.zero_()
            continue
        kept = plan.layers.index(layer)
        heads = set(range(arch.num_attention_heads)) - set(plan.units("num_attention_heads", kept))
        neurons = set(range(arch.ffn_hidden_size)) - set(plan.units("ffn_hidden_size", kept))
        for head in heads:
            projection[:, head * arch.kv_channels : (head + 1) * arch.kv_channels] = 0
        second[:, sorted(neurons)] = 0
    tokens = torch.randint(0, len(words), (7,), generator=torch.Generator().manual_seed(seed))
    sliced_logits = forward(prune(model, plan), plan.target, tokens)
    torch.testing.assert_close(sliced_logits, forward(masked, arch, words[tokens])[:, words], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(sliced_logits, forward(model, arch, words[tokens])[:, words], rtol=1e-3)
