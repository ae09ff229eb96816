"""Laws of pruning whole models: identity, composition, shapes, and equality with the masked model."""

import dataclasses
import itertools

import pytest
import torch
from random_scores import random_scores
from torch import Tensor
from torch.nn import functional

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import ShapedSource, stream
from minitron_nemo.pruning.cut import PrunedSource
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.plan import PruningPlan, identity
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import shrink
from minitron_nemo.shape.tensors import logical_tensors

# layers, hidden, ffn, query groups, heads per group, kv_channels
SHAPES = [(4, 12, 10, 2, 4, 3), (3, 8, 16, 1, 6, 2), (5, 9, 7, 4, 2, 1)]
KINDS = [("swiglu", "RMSNorm", False), ("squared_relu", "LayerNorm1p", False), ("swiglu", "LayerNorm1p", True)]
CASES = list(itertools.product(SHAPES, KINDS, range(2)))
Model = dict[str, Tensor]


def arch_of(shape: tuple[int, ...], kind: tuple[str, str, bool]) -> ModelArch:
    layers, hidden, ffn, groups, heads, channels = shape
    activation, normalization, tied = kind
    return ModelArch(num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=groups * heads,
                     num_query_groups=groups, kv_channels=channels, vocab_size=13, seq_length=16, activation=activation,
                     normalization=normalization, share_embeddings_and_output_weights=tied)  # fmt: skip


class InMemory(ShapedSource):
    """A model held as a mapping."""

    def __init__(self, arch: ModelArch, model: Model) -> None:
        super().__init__(arch)
        self.model = model

    def dtype(self, name: str) -> torch.dtype:
        return self.model[name].dtype

    def read(self, name: str, box: Box | None = None) -> Tensor:
        return self.model[name] if box is None else self.model[name][box.slices()]


def random_model(arch: ModelArch, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape(arch), generator=generator, dtype=torch.float64)
        for name, tensor in logical_tensors(arch).items()
    }


def smaller(arch: ModelArch, *axes: str) -> ModelArch:
    """A target one step smaller on each axis; heads by one in every group."""
    steps = {"num_layers": 1, "hidden_size": 3, "ffn_hidden_size": 2, "num_attention_heads": arch.num_query_groups}
    return shrink(arch, **{axis: max(getattr(arch, axis) - steps[axis], steps[axis]) for axis in axes})


ALL_AXES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


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


def forward(model: Model, arch: ModelArch, tokens: Tensor) -> Tensor:
    """Logits of the reference model, [s, vocab]: written from the packings' definitions, without rotary embedding."""

    def get(name: str, layer: int | None = None) -> Tensor:
        return model[name if layer is None else name.replace("layers.", f"layers.{layer}.")]

    def norm(x: Tensor, key: str, layer: int | None = None) -> Tensor:
        if arch.normalization == "RMSNorm":
            return functional.rms_norm(x, x.shape[-1:], get(f"{key}weight", layer))
        return functional.layer_norm(x, x.shape[-1:], 1 + get(f"{key}weight", layer), get(f"{key}bias", layer))

    x = get("embedding.word_embeddings.weight")[tokens]
    for layer in range(arch.num_layers):
        name = "decoder.layers.self_attention."
        fused = norm(x, f"{name}linear_qkv.layer_norm_", layer) @ get(f"{name}linear_qkv.weight", layer).T
        heads = []
        for group in fused.chunk(arch.num_query_groups, dim=-1):
            *queries, key, value = group.split(arch.kv_channels, dim=-1)
            heads += [
                functional.scaled_dot_product_attention(q[None], key[None], value[None], is_causal=True)[0]
                for q in queries
            ]
        x = x + torch.cat(heads, dim=-1) @ get(f"{name}linear_proj.weight", layer).T
        name = "decoder.layers.mlp."
        first = norm(x, f"{name}linear_fc1.layer_norm_", layer) @ get(f"{name}linear_fc1.weight", layer).T
        if arch.is_gated:
            gate, up = first.chunk(2, dim=-1)
            neurons = functional.silu(gate) * up
        else:
            neurons = functional.relu(first).square()
        x = x + neurons @ get(f"{name}linear_fc2.weight", layer).T
    x = norm(x, "decoder.final_layernorm.")
    tied = arch.share_embeddings_and_output_weights
    return x @ get("embedding.word_embeddings.weight" if tied else "output_layer.weight").T


@pytest.mark.parametrize(("shape", "kind", "seed"), CASES)
def test_the_sliced_model_computes_what_the_masked_model_computes(shape, kind, seed):
    arch = arch_of(shape, kind)
    plan = make_plan(
        random_scores(arch, seed=seed), smaller(arch, "num_layers", "ffn_hidden_size", "num_attention_heads")
    )
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
    tokens = torch.randint(0, arch.vocab_size, (7,), generator=torch.Generator().manual_seed(seed))
    sliced_logits = forward(prune(model, plan), plan.target, tokens)
    torch.testing.assert_close(sliced_logits, forward(masked, arch, tokens), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(sliced_logits, forward(model, arch, tokens), rtol=1e-3)
