"""Importance through the real engine: the same in every layout; and a sliced model equals the masked one."""

import dataclasses
import math

import pytest
import torch
from layouts import assert_same_weights, load_model, logits_of
from random_scores import random_scores
from torch import Tensor

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.nemo import NemoFolder, open_nemo, write_nemo
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import ShapedSource, TensorSource, stream
from minitron_nemo.engine.schedule import forward_hidden
from minitron_nemo.importance.hooks import listening
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.pruning.cut import PrunedSource
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.plan import PruningPlan, identity
from minitron_nemo.shape.axes import AXES, shrink
from minitron_nemo.shape.packing import Packing
from minitron_nemo.shape.tensors import HIDDEN
from minitron_nemo.testing import ALONE, LAYOUTS, TINY, random_batch, random_nemo, run_layout

FAMILIES = ("llama", "mistral", "nemotron", "qwen3")  # of Qwen2's biases no hook hears
NUM_SAMPLES = 4
AGGREGATIONS = [("mean", "l2"), ("variance", "mean")]
TARGETS = {
    "ffn": dict(ffn_hidden_size=56),
    "heads": dict(num_attention_heads=4),
    "layers": dict(num_layers=2),
    "hidden": dict(hidden_size=36),
    "all": dict(num_layers=3, hidden_size=32, ffn_hidden_size=40, num_attention_heads=4),
}


def estimate(groups, models):
    """Scores of every model for each of AGGREGATIONS, by axis, as arrays."""
    answers = {}
    for name, path in models.items():
        arch = open_nemo(path).arch
        model = load_model(path, groups).eval()
        mine = random_batch(arch, samples=NUM_SAMPLES, seed=5)["tokens"].chunk(groups.layout.dp)[groups.dp_rank]
        for sequence, batch in AGGREGATIONS:
            with listening(model, arch=arch, sequence_aggregation=sequence, groups=groups) as statistics:
                for tokens in mine.split(1):
                    forward_hidden(model, [{"tokens": tokens}])
            scores = statistics.finish(batch)
            assert scores.num_samples == NUM_SAMPLES
            answers[name, sequence, batch] = {axis: found.numpy() for axis, found in scores.by_axis.items()}
    return answers


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: random_nemo(folder / f"{name}.nemo", TINY[name]).path for name in FAMILIES}


@pytest.fixture(scope="module")
def alone(models):
    """(model, aggregations) -> scores on one rank."""
    return {key: as_scores(key, values) for key, values in run_layout(estimate, ALONE, models).items()}


def as_scores(key, values) -> ImportanceScores:
    name, sequence, batch = key
    return ImportanceScores(
        arch=TINY[name], by_axis={axis: torch.from_numpy(array) for axis, array in values.items()},
        num_samples=NUM_SAMPLES, seq_length=16, sequence_aggregation=sequence, batch_aggregation=batch,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_and_kept_units_are_the_same_in_every_layout(layout, models, alone):
    for key, values in run_layout(estimate, LAYOUTS[layout], models).items():
        ours, theirs = as_scores(key, values), alone[key]
        for axis in theirs.by_axis:
            # A block importance is one minus a cosine, so its error is that of numbers near one.
            torch.testing.assert_close(ours[axis], theirs[axis], rtol=2e-5, atol=1e-6,
                                       msg=lambda text, axis=axis, key=key: f"{key} {axis}: {text}")  # fmt: skip
        for target in TARGETS.values():
            arch = shrink(TINY[key[0]], **target)
            assert make_plan(ours, arch) == make_plan(theirs, arch), f"{key} {target}"


def write_model(path, source: TensorSource) -> NemoFolder:
    write_nemo(path, source.arch, stream(source), dtype=torch.float32, tokenizer=None, origin=Origin("test"))
    return open_nemo(path)


class Masked(ShapedSource):
    """The whole model in which what the plan removes is silent, instead of gone.

    A removed layer writes nothing into the residual stream. Norms of a stream with removed channels would divide by
    the root mean square over all channels; kept/full under the root, and in epsilon, undoes that.
    """

    def __init__(self, source: TensorSource, plan: PruningPlan) -> None:
        self.ratio = plan.target.hidden_size / plan.source.hidden_size
        super().__init__(dataclasses.replace(plan.source, norm_epsilon=plan.source.norm_epsilon * self.ratio))
        self.source = source
        self.plan = plan

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str, box: Box | None = None) -> Tensor:
        tensor, logical = self.source.read(name, box).clone(), self.tensors[name]
        if logical.layer is not None and logical.layer not in self.plan.layers:
            return torch.zeros_like(tensor) if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else tensor
        place = None if logical.layer is None else self.plan.layers.index(logical.layer)
        for dimension, dim in enumerate(logical.row.dims):
            removed = torch.ones(tensor.shape[dimension], dtype=torch.bool)
            removed[self.kept(dim, place)] = False
            tensor.index_fill_(dimension, removed.nonzero()[:, 0], 0.0)
        return tensor * math.sqrt(self.ratio) if logical.row.dims == (HIDDEN,) and self.ratio < 1 else tensor

    def kept(self, dim: Packing, place: int | None) -> Tensor | slice:
        units = {axis: torch.tensor(self.plan.units(axis, place)) for axis in dim.axes if axis in AXES}
        elements = dim.keep(units, self.plan.source)
        return slice(None) if elements is None else elements


@pytest.mark.parametrize(("family", "layout"), [("llama", "tp2_sp"), ("mistral", "pp2"), ("nemotron", "tp2")])
def test_a_sliced_model_equals_the_masked_one(family, layout, models, alone, tmp_path):
    source = open_nemo(models[family])
    # The mean of LayerNorm1p also counts the removed channels, so only RMSNorm has an equal masked model.
    targets = [name for name in TARGETS if family != "nemotron" or name not in ("hidden", "all")]
    sliced_paths, masked_paths = [], []
    for name in targets:
        plan = make_plan(alone[family, "mean", "l2"], shrink(source.arch, **TARGETS[name]))
        sliced_paths.append(write_model(tmp_path / f"{name}.nemo", PrunedSource(source.weights, plan)).path)
        masked_paths.append(write_model(tmp_path / f"{name}_masked.nemo", Masked(source.weights, plan)).path)
    tokens = random_batch(source.arch, samples=2, seed=9)["tokens"]
    (whole,) = run_layout(logits_of, ALONE, [source.path], tokens)
    ours = run_layout(logits_of, LAYOUTS[layout], sliced_paths, tokens)
    theirs = run_layout(logits_of, ALONE, masked_paths, tokens)
    for name, a, b in zip(targets, ours, theirs, strict=True):
        assert abs(b - whole).max() > 1e-2, f"{name}: pruning that changes nothing would prove nothing"
        torch.testing.assert_close(torch.from_numpy(a), torch.from_numpy(b), rtol=0, atol=1e-5,
                                   msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_plan_changes_no_bit(family, models, tmp_path):
    source = open_nemo(models[family])
    copy = write_model(tmp_path / "copy.nemo", PrunedSource(source.weights, identity(source.arch)))
    assert_same_weights(copy, source)
    for file in sorted((source.path / "model_weights").glob("*.distcp")):
        assert (copy.path / "model_weights" / file.name).read_bytes() == file.read_bytes(), file.name


def test_pruning_twice_equals_pruning_once_by_the_composed_plan(models, alone, tmp_path):
    source = open_nemo(models["llama"])
    first = make_plan(alone["llama", "mean", "l2"], shrink(source.arch, **TARGETS["all"]))
    # Any scores do for the second cut.
    target = shrink(first.target, num_layers=2, hidden_size=24, ffn_hidden_size=32)
    second = make_plan(random_scores(first.target), target)
    once = write_model(tmp_path / "once.nemo", PrunedSource(source.weights, first))
    twice = write_model(tmp_path / "twice.nemo", PrunedSource(once.weights, second))
    at_once = write_model(tmp_path / "at_once.nemo", PrunedSource(source.weights, first.then(second)))
    assert_same_weights(at_once, twice)
