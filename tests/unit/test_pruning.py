"""Laws of pruning whole models: identity, composition, shapes, and equality with the masked model."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from minitron_nemo.arch import ModelArch
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.parameters import Parameter, logical_tensors
from minitron_nemo.pruning.apply import pruned_tensor, pruned_tensors
from minitron_nemo.pruning.plan import PruningPlan, identity, make_plan

# layers, hidden, ffn, query groups, heads per group, kv_channels
SHAPES = [(4, 12, 10, 2, 4, 3), (3, 8, 16, 1, 6, 2), (5, 9, 7, 4, 2, 1)]
KINDS = [("swiglu", "RMSNorm", False), ("squared_relu", "LayerNorm1p", False), ("swiglu", "LayerNorm1p", True)]
CASES = list(itertools.product(SHAPES, KINDS, range(2)))
Model = dict[tuple[str, int | None], Tensor]


def arch_of(shape: tuple[int, ...], kind: tuple[str, str, bool]) -> ModelArch:
    layers, hidden, ffn, groups, heads, channels = shape
    activation, normalization, tied = kind
    return ModelArch(num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=groups * heads,
                     num_query_groups=groups, kv_channels=channels, vocab_size=13, seq_length=16, activation=activation,
                     normalization=normalization, share_embeddings_and_output_weights=tied)  # fmt: skip


def random_model(arch: ModelArch, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return {
        (row.key, layer): torch.randn(row.shape(arch), generator=generator, dtype=torch.float64)
        for row, layer in logical_tensors(arch)
    }


def random_scores(arch: ModelArch, seed: int) -> ImportanceScores:
    generator = torch.Generator().manual_seed(seed)
    return ImportanceScores(
        arch=arch,
        hidden_size=torch.rand(arch.hidden_size, generator=generator),
        ffn_hidden_size=torch.rand(arch.num_layers, arch.ffn_hidden_size, generator=generator),
        num_attention_heads=torch.rand(arch.num_layers, arch.num_attention_heads, generator=generator),
        num_layers=torch.rand(arch.num_layers, generator=generator),
        num_samples=1,
        seq_length=1,
        sequence_aggregation="mean",
        batch_aggregation="l2",
    )


def smaller(arch: ModelArch, *axes: str) -> ModelArch:
    """A target one step smaller on each axis; heads by one in every group."""
    steps = {"num_layers": 1, "hidden_size": 3, "ffn_hidden_size": 2, "num_attention_heads": arch.num_query_groups}
    return arch.shrink(**{axis: max(getattr(arch, axis) - steps[axis], steps[axis]) for axis in axes})


ALL_AXES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")


def prune(model: Model, plan: PruningPlan) -> Model:
    def read(parameter: Parameter, layer: int | None) -> Tensor:
        return model[parameter.key, layer]

    tensors = pruned_tensors(read, plan)
    return {(row.key, layer): tensors(row, layer) for row, layer in logical_tensors(plan.target)}


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
    plan = make_plan(random_scores(arch, seed), smaller(arch, *ALL_AXES))
    pruned = prune(random_model(arch, seed), plan)
    expected = {(row.key, layer): row.shape(plan.target) for row, layer in logical_tensors(plan.target)}
    assert {name: tuple(tensor.shape) for name, tensor in pruned.items()} == expected
    assert sum(tensor.numel() for tensor in pruned.values()) == plan.target.num_params()


@pytest.mark.parametrize(("shape", "kind", "seed"), CASES)
def test_pruning_twice_is_pruning_once_by_the_composed_plan(shape, kind, seed):
    arch = arch_of(shape, kind)
    first = make_plan(random_scores(arch, seed), smaller(arch, *ALL_AXES))
    second = make_plan(random_scores(first.target, seed + 50), smaller(first.target, *ALL_AXES))
    model = random_model(arch, seed)
    assert_equal(prune(prune(model, first), second), prune(model, first.then(second)))


@pytest.mark.parametrize(("shape", "kind", "seed"), CASES)
def test_axes_can_be_pruned_one_after_another_in_any_order(shape, kind, seed):
    arch = arch_of(shape, kind)
    scores = random_scores(arch, seed)
    at_once = make_plan(scores, smaller(arch, *ALL_AXES))
    model = random_model(arch, seed)
    # Width first: the layers that go are still there to be cut.
    width = make_plan(scores, smaller(arch, *ALL_AXES[1:]))
    depth = dataclasses.replace(identity(width.target), target=at_once.target, layers=at_once.layers, **{
        axis: getattr(identity(at_once.target), axis) for axis in ("ffn_hidden_size", "num_attention_heads")
    })  # fmt: skip
    assert_equal(prune(prune(model, width), depth), prune(model, at_once))


def test_a_cut_to_another_shape_than_the_target_is_refused():
    arch = arch_of(SHAPES[0], KINDS[0])
    row = logical_tensors(arch)[0][0]
    with pytest.raises(ValueError, match=row.key):
        pruned_tensor(lambda *_: torch.ones(2, 2), row, layer=None, plan=identity(arch))


def forward(model: Model, arch: ModelArch, tokens: Tensor) -> Tensor:
    """Logits of the reference model, [s, vocab]: written from the packings' definitions, without rotary embedding."""

    def get(name: str, layer: int | None = None) -> Tensor:
        return model[name, layer]

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
    plan = make_plan(random_scores(arch, seed), smaller(arch, "num_layers", "ffn_hidden_size", "num_attention_heads"))
    model = random_model(arch, seed)
    masked = {name: tensor.clone() for name, tensor in model.items()}
    outputs = ("decoder.layers.self_attention.linear_proj.weight", "decoder.layers.mlp.linear_fc2.weight")
    for layer in range(arch.num_layers):
        if layer not in plan.layers:
            for key in outputs:
                masked[key, layer].zero_()
            continue
        kept = plan.layers.index(layer)
        heads = set(range(arch.num_attention_heads)) - set(plan.num_attention_heads[kept])
        neurons = set(range(arch.ffn_hidden_size)) - set(plan.ffn_hidden_size[kept])
        for head in heads:
            masked[outputs[0], layer][:, head * arch.kv_channels : (head + 1) * arch.kv_channels] = 0
        masked[outputs[1], layer][:, sorted(neurons)] = 0
    tokens = torch.randint(0, arch.vocab_size, (7,), generator=torch.Generator().manual_seed(seed))
    sliced_logits = forward(prune(model, plan), plan.target, tokens)
    torch.testing.assert_close(sliced_logits, forward(masked, arch, tokens), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(sliced_logits, forward(model, arch, tokens), rtol=1e-3)
