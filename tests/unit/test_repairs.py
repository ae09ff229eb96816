"""Repairs against brute force on calibration activations; with nothing removed each changes nothing."""

import dataclasses
import itertools

import pytest
import torch
from in_memory import InMemory
from plain_moments import recorded, write_moments
from random_scores import random_scores

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.config.repairs import HeadResidual, RepairsConfig
from minitron_nemo.config.schema import identity as fingerprinted
from minitron_nemo.errors import UserError
from minitron_nemo.importance.second_moments import SecondMomentFile
from minitron_nemo.pruning.cut import PrunedSource
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.plan import identity
from minitron_nemo.pruning.proof import ProofError
from minitron_nemo.pruning.repairs.least_squares import refit
from minitron_nemo.pruning.repairs.residual import NormMoments
from minitron_nemo.pruning.repairs.sources import Repairs, repaired
from minitron_nemo.shape.axes import shrink
from minitron_nemo.steps.prune import prune, repairs_of
from minitron_nemo.testing import TINY, random_batch

# Four heads in each of two groups, of which three stay: more than one removed head would need more than half.
# Norms of queries and keys are no repair's concern.
ARCHS = {name: dataclasses.replace(TINY[name], num_query_groups=2, num_layers=2)
         for name in ("llama", "mistral", "nemotron", "qwen2")}  # fmt: skip
TARGET = {"hidden_size": 36, "ffn_hidden_size": 50, "num_attention_heads": 6}
KINDS = {
    "head_residual": Repairs(head_residual="plus"),
    "norm_scale": Repairs(norm_scale=True),
    "projections": Repairs(projections=True),
    "residual_stream": Repairs(residual_stream=True),
    "norm_bias": Repairs(norm_bias=True),
}


@dataclasses.dataclass
class World:
    """A model, its plan, what was heard in a forward pass, and the file of it."""

    source: InMemory
    scores: object
    plan: object
    heard: object
    moments: SecondMomentFile

    def repaired(self, repairs, plan=None):
        return repaired(self.source, plan or self.plan, repairs, scores=self.scores, moments=self.moments)


@pytest.fixture(scope="module", params=ARCHS)
def world(request, tmp_path_factory):
    arch = ARCHS[request.param]
    source, scores = InMemory(arch), random_scores(arch, seed=3)
    heard = recorded(source, random_batch(arch, samples=8, seed=2)["tokens"])
    folder = tmp_path_factory.mktemp("importance")
    write_moments(folder, source, heard)
    plan = make_plan(scores, shrink(arch, **TARGET))
    return World(source, scores, plan, heard, SecondMomentFile(folder, arch))


def allowed(world):
    return {n: r for n, r in KINDS.items() if n != "norm_bias" or world.source.arch.has_norm_bias}


def test_with_nothing_removed_every_repair_changes_no_bit(world):
    whole = identity(world.source.arch)
    for name, repairs in allowed(world).items():
        for tensor, value in stream(world.repaired(repairs, whole)):
            assert torch.equal(value, world.source.read(tensor)), f"{name}: {tensor}"


def test_each_repair_changes_its_tensors_and_no_others(world):
    cut = dict(stream(PrunedSource(world.source, world.plan)))
    concerned = {
        "head_residual": ("linear_qkv.weight", "linear_qkv.bias"),
        "norm_scale": ("norm_weight", "final_layernorm.weight"),
        "projections": ("linear_proj.weight", "linear_fc2.weight"),
        "residual_stream": ("linear_qkv.weight", "linear_fc1.weight", "output_layer.weight"),
        "norm_bias": ("norm_bias", "final_layernorm.bias"),
    }
    for name, repairs in allowed(world).items():
        source = world.repaired(repairs)
        assert source.names() == list(cut)
        for tensor, value in stream(source):
            assert value.shape == cut[tensor].shape
            assert value.dtype == source.dtype(tensor) == torch.float32
            box = Box((0,) * value.dim(), tuple(size // 2 for size in value.shape))
            assert torch.equal(source.read(tensor, box), value[box.slices()])
            assert torch.equal(value, cut[tensor]) != tensor.endswith(concerned[name]), f"{name}: {tensor}"


def test_who_vouches_for_the_weights_is_asked_through_every_repair(world, monkeypatch):
    for name, repairs in allowed(world).items():
        asked, source = [], world.repaired(repairs)
        monkeypatch.setattr(world.source, "verify", lambda asked=asked: asked.append(True))
        for _ in stream(source):
            assert not asked
        assert asked == [True], name


# Least squares


def test_without_a_ridge_it_is_lstsq_and_with_one_it_never_loses():
    generator = torch.Generator().manual_seed(0)
    for tokens, ridge in itertools.product((200, 9), (1e-12, 1e-3, 1.0, 100.0)):
        x = torch.randn(tokens, 12, generator=generator, dtype=torch.float64) @ torch.randn(
            12, 12, generator=generator, dtype=torch.float64
        )
        weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        kept = torch.tensor([0, 3, 4, 7, 8, 10, 11])
        found, cut = refit(weight, kept, x.T @ x, ridge=ridge), weight[:, kept]
        if tokens == 200 and ridge == 1e-12:
            torch.testing.assert_close(found, torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T)
        error, before = ((x[:, kept] @ w.T - x @ weight.T).norm() for w in (found, cut))
        assert error <= before
        assert ridge > 1 or error < 0.9 * before, "a repair that hardly repairs"


def test_a_large_ridge_leaves_the_cut_and_dead_inputs_do_no_harm():
    x, weight, kept = torch.randn(50, 6).double(), torch.randn(3, 6).double(), torch.tensor([1, 2, 5])
    torch.testing.assert_close(refit(weight, kept, x.T @ x, ridge=1e12), weight[:, kept])
    x[:, kept] = 0
    torch.testing.assert_close(refit(weight, kept, x.T @ x, ridge=1e-3), weight[:, kept])


def kept_inputs(world, name, layer):
    plan, d = world.plan, world.source.arch.kv_channels
    if "linear_fc2" in name:
        return list(plan.units("ffn_hidden_size", layer))
    if "linear_proj" in name:
        return [head * d + channel for head in plan.units("num_attention_heads", layer) for channel in range(d)]
    return list(plan.units("hidden_size"))


def test_refitted_projections_are_nearer_to_the_whole_outputs_on_the_calibration_tokens(world):
    """In the world of the whole model: its inputs, the outputs that stay."""
    source, cut = world.repaired(Repairs(projections=True, ridge=1e-4)), PrunedSource(world.source, world.plan)
    rows = list(world.plan.units("hidden_size"))
    for layer, part in itertools.product(range(2), ("self_attention.linear_proj", "mlp.linear_fc2")):
        name = f"decoder.layers.{layer}.{part}.weight"
        x = world.heard.heard[f"{part.split('.')[1]}.layer_{layer:02d}"]
        wanted = x @ world.source.read(name)[rows].double().T
        x = x[:, kept_inputs(world, name, layer)]
        error, before = ((x @ model.read(name).double().T - wanted).norm() for model in (source, cut))
        assert error < 0.9 * before, name
        # The normal equations by hand, with the ridge towards the cut.
        weight = cut.read(name).double()
        scale = 1e-4 * x.square().sum(0).mean()
        rest = wanted - x @ weight.T
        stacked = torch.cat((x, scale.sqrt() * torch.eye(x.shape[1]).double()))
        change = torch.linalg.lstsq(stacked, torch.cat((rest, torch.zeros(x.shape[1], len(rows)).double()))).solution
        torch.testing.assert_close(source.read(name).double(), weight + change.T, rtol=1e-3, atol=1e-3)


def test_readers_of_the_residual_stream_are_refitted_on_what_their_norm_gives(world):
    source, cut = world.repaired(Repairs(residual_stream=True, ridge=1e-4)), PrunedSource(world.source, world.plan)
    places = [("self_attention.linear_qkv", "input_layernorm"), ("mlp.linear_fc1", "pre_mlp_layernorm")]
    names = [(f"decoder.layers.{i}.{p}.weight", f"{s}.layer_{i:02d}") for i in range(2) for p, s in places]
    names += [("output_layer.weight", "final_layernorm")] if "output_layer.weight" in source.names() else []
    kept = list(world.plan.units("hidden_size"))
    uncut_columns = dataclasses.replace(
        world.plan,
        target=shrink(world.source.arch, **{k: v for k, v in TARGET.items() if k != "hidden_size"}),
        keep=world.plan.keep | {"hidden_size": (tuple(range(world.source.arch.hidden_size)),)},
    )
    for name, site in names:
        z = world.heard.outputs_of_norms[site]
        wanted = z @ PrunedSource(world.source, uncut_columns).read(name).double().T
        error, before = ((z[:, kept] @ m.read(name).double().T - wanted).norm() for m in (source, cut))
        assert error < 0.95 * before, name
        best = torch.linalg.lstsq(z[:, kept], wanted).solution
        assert (z[:, kept] @ best - wanted).norm() >= 0.95 * error, name


def test_moments_are_those_of_the_kept_layers_where_dropped_layers_shift_them(world):
    target = shrink(world.source.arch, num_layers=1, ffn_hidden_size=50)
    plan = make_plan(world.scores, target, drop_layers=[1])
    found = world.repaired(Repairs(projections=True, ridge=1e-9), plan).read("decoder.layers.0.mlp.linear_fc2.weight")
    x, kept = world.heard.heard["linear_fc2.layer_01"], list(plan.units("ffn_hidden_size", 0))
    wanted = x @ world.source.read("decoder.layers.1.mlp.linear_fc2.weight").double().T
    best = torch.linalg.lstsq(x[:, kept], wanted).solution
    torch.testing.assert_close(
        (x[:, kept] @ found.double().T - wanted).norm(), (x[:, kept] @ best - wanted).norm(), rtol=1e-3, atol=1e-4
    )


# Norms


def pruned_norm(world, n_TK):
    """What the norm of the pruned model makes of the kept channels, before its weight."""
    if world.source.arch.has_norm_bias:
        n_TK = n_TK - n_TK.mean(-1, keepdim=True)
    return n_TK / n_TK.square().mean(-1, keepdim=True).sqrt()


def test_scaled_norms_give_the_mean_square_of_the_whole_model(world):
    """Over all calibration tokens, the pruned norm with its new weight of 1 has the energy the kept channels had."""
    source, cut = world.repaired(Repairs(norm_scale=True)), PrunedSource(world.source, world.plan)
    kept = list(world.plan.units("hidden_size"))
    one = 1 if world.source.arch.has_norm_bias else 0
    for name, site in (
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "input_layernorm.layer_01"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.layer_00"),
        ("decoder.final_layernorm.weight", "final_layernorm"),
    ):
        factor = (source.read(name) + one) / (cut.read(name) + one)
        n = world.heard.heard[site][:, kept]
        if one:
            n = n - n.mean(-1, keepdim=True)
        torch.testing.assert_close(factor.double(), torch.full_like(factor, 1).double() * n.square().mean().sqrt())
        after = pruned_norm(world, n)
        assert (factor.double() * after).square().mean() == pytest.approx(float(n.square().mean()), rel=1e-4)
        assert abs(float(factor[0]) - 1) > 1e-3, "a scale of one would prove nothing"


def test_biases_take_up_the_mean_of_what_is_gone(world):
    if not world.source.arch.has_norm_bias:
        with pytest.raises(UserError, match="norms of this model have no bias .RMSNorm"):
            world.repaired(Repairs(norm_bias=True))
        return
    kept = list(world.plan.units("hidden_size"))
    for also in (Repairs(), Repairs(norm_scale=True, residual_stream=True)):
        before = world.repaired(also)
        source = world.repaired(dataclasses.replace(also, norm_bias=True, ridge=1e-6))
        name = "decoder.layers.1.mlp.linear_fc1"
        neurons = list(world.plan.units("ffn_hidden_size", 1))
        wanted = (world.heard.outputs_of_norms["pre_mlp_layernorm.layer_01"].mean(0)
                  @ world.source.read(f"{name}.weight")[neurons].double().T)  # fmt: skip
        after = pruned_norm(world, world.heard.heard["pre_mlp_layernorm.layer_01"][:, kept]).mean(0)
        reader = source.read(f"{name}.weight").double()
        weight = 1 + source.read(f"{name}.layer_norm_weight").double()
        errors, biases = [], []
        for model in (before, source):
            biases.append(model.read(f"{name}.layer_norm_bias").double())
            errors.append(float((reader @ (weight * after + biases[-1]) - wanted).norm()))
        assert errors[1] < 0.8 * errors[0]
        # To the first order in what the spread of the kept energy does to the mean.
        products, sums = world.moments.sums("pre_mlp_layernorm", 1)
        moments = NormMoments(products / world.moments.tokens, sums / world.moments.tokens, is_layer_norm=True)
        expected = moments.mean_after(torch.tensor(kept))
        torch.testing.assert_close(expected, after, rtol=0.1, atol=0.05)
        missing = wanted - reader @ (weight * expected + biases[0])
        best = torch.linalg.lstsq(reader, missing[:, None]).solution[:, 0]
        torch.testing.assert_close(biases[1] - biases[0], best, rtol=1e-2, atol=1e-3)


# Head residual


@pytest.mark.parametrize(("sign", "factor"), [("plus", 1), ("minus", -1)])
def test_the_weakest_kept_head_takes_from_the_strongest_removed_one(world, sign, factor):
    """Seven of ten heads a group, written out with the paper's index from 2K - L + 1 to K, counted from 1."""
    arch = dataclasses.replace(world.source.arch, num_attention_heads=20, num_query_groups=2, num_layers=1)
    L, K = 10, 7
    source, scores = InMemory(arch), random_scores(arch, seed=8)
    plan = make_plan(scores, shrink(arch, num_attention_heads=14))
    found = repaired(source, plan, Repairs(head_residual=sign), scores=scores)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    whole = source.read(name).unflatten(0, (2, L + 2, arch.kv_channels))
    new = found.read(name).unflatten(0, (2, K + 2, arch.kv_channels))
    for group in range(2):
        ranked = scores["num_attention_heads"][0, group * L : (group + 1) * L].argsort(descending=True).tolist()
        head = {number: whole[group, index] for number, index in enumerate(ranked, start=1)}
        kept = {i: head[i] for i in range(1, K + 1)}
        for i in range(2 * K - L + 1, K + 1):
            kept[i] = head[i] + factor * (head[i] - head[2 * K - i + 1])
        order = sorted(range(1, K + 1), key=lambda i: ranked[i - 1])
        torch.testing.assert_close(new[group, :K], torch.stack([kept[i] for i in order]))
        assert torch.equal(new[group, K:], whole[group, L:]), "keys and values stay"


def test_fewer_than_half_of_the_heads_are_refused(world):
    plan = make_plan(world.scores, shrink(world.source.arch, num_attention_heads=2))
    with pytest.raises(UserError, match="1 of 4 heads of each group stay.*keep at least 2"):
        world.repaired(Repairs(head_residual="plus"), plan)


# In a cut


@pytest.fixture
def teacher(world, tmp_path):
    write_nemo(tmp_path / "teacher.nemo", world.source.arch, stream(world.source), dtype=torch.float32, tokenizer=None,
               origin=Origin("t"))  # fmt: skip
    folder = tmp_path / "importance"
    folder.mkdir()
    world.scores.write(folder)
    write_moments(folder, world.source, world.heard)
    return open_nemo(tmp_path / "teacher.nemo")


def test_a_repaired_cut_is_published_with_its_proof(world, teacher, tmp_path, monkeypatch):
    every = Repairs("minus", norm_scale=True, projections=True, residual_stream=True,
                    norm_bias=world.source.arch.has_norm_bias)  # fmt: skip
    student = prune(teacher, world.plan, tmp_path / "s.nemo", repairs=every, importance=tmp_path / "importance")
    plain = prune(teacher, world.plan, tmp_path / "plain.nemo")
    assert student.manifest.extra["proof"] == plain.manifest.extra["proof"], "the cut is proven, before its repairs"
    assert student.manifest.fingerprint != plain.manifest.fingerprint
    for name, tensor in stream(world.repaired(every)):
        assert torch.equal(student.weights.read(name), tensor), name
    with pytest.raises(UserError, match="need the importance folder"):
        prune(teacher, world.plan, tmp_path / "t.nemo", repairs=every)
    every_time_another = itertools.count()
    monkeypatch.setattr("minitron_nemo.pruning.proof._sha256", lambda tensor: str(next(every_time_another)))
    with pytest.raises(
        ProofError, match="embedding.word_embeddings.weight is not in the checkpoint as it was repaired"
    ):
        prune(teacher, world.plan, tmp_path / "t.nemo", repairs=every, importance=tmp_path / "importance")
    assert not (tmp_path / "t.nemo").exists()


def test_settings_become_repairs_and_defaults_leave_fingerprints_alone():
    assert repairs_of(RepairsConfig()) is None
    assert fingerprinted(RepairsConfig()) == {}
    wanted = RepairsConfig(head_residual=HeadResidual.minus, projections=True, ridge=0.5)
    assert repairs_of(wanted) == Repairs("minus", projections=True, ridge=0.5)
    assert fingerprinted(wanted) == {"head_residual": "minus", "projections": True, "ridge": 0.5}
