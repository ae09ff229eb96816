"""Importance, kept units and cut tensors against an independent implementation: NVIDIA's ModelOpt on the same models.

`make test-oracle`; the environment needs the extra `oracle`. README.md beside this file lists what differs on purpose.
"""

import dataclasses

import numpy as np
import pytest
import torch
from layouts import load_model, logits_of
from oracle.modelopt_side import megatron_name, prune_by_modelopt
from torch import Tensor

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.engine.schedule import forward_hidden
from minitron_nemo.importance.estimators import aggregate, moments
from minitron_nemo.importance.hooks import listening
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.pruning.cut import PrunedSource
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.plan import PruningPlan
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import shrink
from minitron_nemo.shape.packing import Gated, GroupedQuery, Heads, Packing
from minitron_nemo.testing import ALONE, TINY, random_batch, random_nemo, run_layout

NUM_SAMPLES = 4
SECONDS = ("mlp.linear_fc2", "self_attention.linear_proj")  # their columns are neurons and heads
EXPORTS = {
    "neurons": {"ffn_hidden_size": 56},
    "channels": {"hidden_size": 36},
    "heads": {"num_attention_heads": 4, "num_query_groups": 4},
    "layers": {"num_layers": 2},
    "all": {"ffn_hidden_size": 40, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 4, "num_layers": 3},
}


def estimate(groups, path, tokens_BS):
    """Our scores by axis; and what the heads put out, [L, S, B, C]."""
    arch = open_nemo(path).arch
    model, heard = load_model(path, groups).eval(), []
    hooks = [layer.self_attention.linear_proj.register_forward_pre_hook(lambda _, args: heard.append(args[0].detach()))
             for layer in model[0].decoder.layers]  # fmt: skip
    with listening(model, arch=arch, groups=groups) as statistics:
        forward_hidden(model, [{"tokens": tokens_BS}])
    for hook in hooks:
        hook.remove()
    scores = statistics.finish()
    return {axis: values.numpy() for axis, values in scores.by_axis.items()}, torch.stack(heard).numpy()


@dataclasses.dataclass
class Case:
    source: object  # the opened checkpoint
    ours: ImportanceScores
    heads_out: Tensor  # [L, S, B, C]
    theirs: dict
    probe: Tensor

    def published_head_scores(self) -> Tensor:
        """[L, N] in the order of the published code: each channel over the sequence and the samples, then the norm."""
        arch: ModelArch = self.source.arch
        channels = [aggregate(moments(aggregate(moments(x_SBC), "mean")), "l2") for x_SBC in self.heads_out]
        return torch.stack(channels).unflatten(-1, (-1, arch.kv_channels)).norm(dim=-1)

    def plan(self, case: str) -> PruningPlan:
        """Of our scores, but the heads' in the published order."""
        arch = self.source.arch
        sizes = {axis: size for axis, size in EXPORTS[case].items() if axis != "num_query_groups"}
        by_axis = self.ours.by_axis | {"num_attention_heads": self.published_head_scores()}
        return make_plan(dataclasses.replace(self.ours, by_axis=by_axis), shrink(arch, **sizes))


@pytest.fixture(scope="module", params=["llama", "mistral", "nemotron"])
def both(request, tmp_path_factory) -> Case:
    arch = TINY[request.param]
    source = random_nemo(tmp_path_factory.mktemp("oracle") / "model.nemo", arch)
    calibration = random_batch(arch, samples=NUM_SAMPLES, seed=5)["tokens"]
    probe = random_batch(arch, samples=2, seed=9)["tokens"]
    scores, heads_out = run_layout(estimate, ALONE, source.path, calibration)
    ours = ImportanceScores(
        arch=arch, by_axis={axis: torch.from_numpy(values) for axis, values in scores.items()},
        num_samples=NUM_SAMPLES, seq_length=16, sequence_aggregation="mean", batch_aggregation="l2",
    )  # fmt: skip
    theirs = run_layout(prune_by_modelopt, ALONE, source.path, EXPORTS, calibration, probe)
    return Case(source, ours, torch.from_numpy(heads_out), theirs, probe)


def close(ours, theirs, **tolerance) -> None:
    torch.testing.assert_close(torch.as_tensor(ours).double(), torch.as_tensor(theirs).double(), **tolerance)


def test_the_model_before_pruning_computes_the_same(both):
    (ours,) = run_layout(logits_of, ALONE, [both.source.path], both.probe)
    for found in both.theirs.values():
        close(ours, found["before"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", ["hidden_size", "ffn_hidden_size", "num_layers"])
def test_scores_are_the_same(axis, both):
    # One minus a mean cosine: its error is that of numbers near one.
    for found in both.theirs.values():
        close(both.ours[axis], found["scores"][axis], rtol=2e-5, atol=2e-6 if axis == "num_layers" else 0)


def test_head_scores_differ_by_the_order_of_the_norm_alone(both):
    for found in both.theirs.values():
        close(both.published_head_scores(), found["scores"]["num_attention_heads"], rtol=2e-5, atol=0)
    ours, published = both.ours["num_attention_heads"], both.published_head_scores()
    assert not torch.allclose(ours, published, rtol=0.01), "there would be nothing to explain"
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(ours, published, strict=True)]
    print(f"correlation of head scores in each layer: {', '.join(f'{row:.3f}' for row in rows)}")


def test_their_query_group_scores_take_heads_of_other_groups(both):
    """They view the heads as [heads of a group, groups], where Megatron has them as [groups, heads of a group]."""
    arch = both.source.arch
    heads_LN = both.published_head_scores()
    as_they_do = heads_LN.unflatten(-1, (arch.heads_per_group, arch.num_query_groups)).norm(dim=1)
    as_it_lies = heads_LN.unflatten(-1, (arch.num_query_groups, arch.heads_per_group)).norm(dim=2)
    theirs = both.theirs["heads"]["scores"]["num_query_groups"]
    close(as_they_do, theirs, rtol=2e-5, atol=0)
    assert not torch.allclose(as_it_lies, torch.from_numpy(theirs).double(), rtol=1e-2)


def places(theirs: Tensor, source: Tensor) -> list[int] | None:
    """For each row of theirs the row of the source that it is; None when one is of no row, or of two."""
    same = (theirs[:, None] == source[None]).flatten(2).all(dim=-1)
    return same.int().argmax(dim=1).tolist() if bool((same.sum(dim=1) == 1).all()) else None


def kept_by_modelopt(both: Case, case: str) -> tuple[list[int], dict[str, list[list[int]]]]:
    """Layers, and of every axis the units in ModelOpt's order, read off the numbers of its tensors."""
    arch, source = both.source.arch, {megatron_name(name): t for name, t in stream(both.source.weights)}
    tensors = {name: torch.from_numpy(array) for name, array in both.theirs[case]["tensors"].items()}
    hidden = places(tensors["embedding.word_embeddings.weight"].T, source["embedding.word_embeddings.weight"].T)
    layers, neurons, heads = [], [], []
    for place in range(EXPORTS[case].get("num_layers", arch.num_layers)):
        found = []
        for layer in range(arch.num_layers):
            second, projection = (
                f"decoder.layers.{{}}.{name}.weight" for name in ("mlp.linear_fc2", "self_attention.linear_proj")
            )
            ours, theirs = source[second.format(layer)][hidden], tensors[second.format(place)]
            columns, cut = source[projection.format(layer)][hidden], tensors[projection.format(place)]
            if (units := places(theirs.T, ours.T)) is not None:
                d = arch.kv_channels
                found.append((layer, units, places(cut.T[::d], columns.T[::d])))
        ((layer, units, order),) = found
        layers.append(layer)
        neurons.append(units)
        heads.append(order)
    return layers, {"hidden_size": [hidden], "ffn_hidden_size": neurons, "num_attention_heads": heads}


@pytest.mark.parametrize("case", EXPORTS)
def test_the_same_units_and_layers_stay(case, both):
    layers, kept = kept_by_modelopt(both, case)
    plan = both.plan(case)
    assert layers == list(plan.layers)
    for axis, rows in kept.items():
        assert [tuple(sorted(row)) for row in rows] == list(plan.keep[axis]), axis


def ascending(dim: Packing, order: dict[str, list[int]], target: ModelArch) -> Tensor:
    """Elements of a dimension of ModelOpt's tensor, which lists units by score, in ascending order of the units."""
    units = torch.tensor(order.get(dim.axes[-1], range(getattr(target, dim.axes[-1])))).argsort()
    if isinstance(dim, Gated):
        return torch.cat((units, units + len(units)))
    channels = torch.arange(target.kv_channels)
    if isinstance(dim, Heads):
        return (units[:, None] * target.kv_channels + channels).flatten()
    if isinstance(dim, GroupedQuery):
        rows = []
        for queries in units.chunk(target.num_query_groups):  # they list the groups by score too
            start = int(queries[0]) // target.heads_per_group * (target.heads_per_group + 2)
            keys = start + target.heads_per_group
            rows += [start + queries % target.heads_per_group, torch.tensor([keys, keys + 1])]
        return (torch.cat(rows)[:, None] * target.kv_channels + channels).flatten()
    return units


@pytest.mark.parametrize("case", EXPORTS)
def test_tensors_are_the_same_bit_for_bit_once_in_the_same_order(case, both):
    plan = both.plan(case)
    _, kept = kept_by_modelopt(both, case)
    pruned = PrunedSource(both.source.weights, plan)
    tensors = both.theirs[case]["tensors"]
    assert {megatron_name(name) for name in pruned.names()} == set(tensors)
    for name, logical in pruned.tensors.items():
        theirs = torch.from_numpy(tensors[megatron_name(name)])
        order = {axis: rows[0 if len(rows) == 1 else logical.layer] for axis, rows in kept.items()
                 if len(rows) == 1 or logical.layer is not None}  # fmt: skip
        for dimension, dim in enumerate(logical.row.dims):
            theirs = theirs.index_select(dimension, ascending(dim, order, plan.target))
        ours = pruned.read(name)
        plus_one = both.source.arch.has_norm_bias and megatron_name(name).endswith("norm.weight")
        assert torch.equal(ours + 1 if plus_one else ours, theirs), name


@pytest.mark.parametrize("case", EXPORTS)
def test_the_pruned_models_compute_the_same(case, both, tmp_path):
    source = PrunedSource(both.source.weights, both.plan(case))
    write_nemo(tmp_path / "cut.nemo", source.arch, stream(source), dtype=torch.float32, tokenizer=None,
               origin=Origin("oracle"))  # fmt: skip
    (ours,) = run_layout(logits_of, ALONE, [tmp_path / "cut.nemo"], both.probe)
    found = both.theirs[case]
    assert abs(found["logits"] - found["before"]).max() > 1e-2, "pruning that changes nothing would prove nothing"
    close(ours, found["logits"], rtol=1e-4, atol=1e-4)
