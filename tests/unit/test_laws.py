"""Laws of pruning by random shapes, for every axis of the registry: one registered later is held to them unasked."""

import random
from collections import Counter

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from reference_model import InMemory, Model, forward, random_model

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.hf import export_hf, open_hf
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import TensorSource, stream
from minitron_nemo.pruning.cut import PrunedSource
from minitron_nemo.pruning.plan import PruningPlan, identity, num_rows, read_plan
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES, Axis, blocks_first, shrink
from minitron_nemo.shape.tensors import HIDDEN

FAMILIES: dict[str, dict] = {
    "llama": {},
    "nemotron": {"activation": "squared_relu", "normalization": "LayerNorm1p"},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
}
CUTS: Counter[str] = Counter()  # axis -> plans drawn that make it smaller


@st.composite
def shapes(draw: st.DrawFn, *, least: int = 1) -> ModelArch:
    """Any small shape; of every axis there are `least` units, in every block of it."""

    def small(largest: int) -> int:
        return draw(st.integers(least, largest))

    family = draw(st.sampled_from(sorted(FAMILIES)))
    groups = small(4)
    return ModelArch(
        family=family, num_layers=small(3), hidden_size=2 * small(5), ffn_hidden_size=small(12),
        num_attention_heads=groups * small(4), num_query_groups=groups, kv_channels=2 * small(2),
        vocab_size=3 + small(9), seq_length=16, **FAMILIES[family],
        share_embeddings_and_output_weights=family == "llama" and draw(st.booleans()),
    )  # fmt: skip


@st.composite
def plans(draw: st.DrawFn, source: ModelArch, *, whole: tuple[str, ...] = (), less: int = 0) -> PruningPlan:
    """Any plan that the registry allows for this source; axes of `whole` keep all, others lose `less` at least."""
    sizes: dict[str, int] = {}
    for axis in blocks_first():
        blocks = sizes.get(axis.within or "", axis.blocks(source))
        held = axis.size(source) // axis.blocks(source)
        sizes[axis.name] = blocks * (held if axis.name in whole else draw(st.integers(1, held - less)))
    target = shrink(source, **sizes)
    drawn = random.Random(draw(st.integers(0, 2**16)))
    keep: dict[str, tuple[tuple[int, ...], ...]] = {}
    for axis in blocks_first():
        rows = [units(axis, keep, place, source, target, drawn) for place in range(num_rows(axis, target))]
        keep[axis.name] = tuple(rows)
    CUTS.update(axis.name for axis in AXES.values() if axis.size(target) < axis.size(source))
    return PruningPlan(source, target, keep)


def units(axis: Axis, keep: dict, place: int, source: ModelArch, target: ModelArch, drawn: random.Random):
    """As many units of each block that stays as the target has."""
    blocks = range(axis.blocks(source))
    if axis.within in keep:
        rows = keep[axis.within]
        blocks = rows[place if len(rows) > 1 else 0]
    held, wanted = axis.size(source) // axis.blocks(source), axis.size(target) // len(blocks)
    return tuple(unit for block in blocks
                 for unit in sorted(drawn.sample(range(block * held, (block + 1) * held), wanted)))  # fmt: skip


def prune(model: Model, plan: PruningPlan) -> Model:
    return dict(stream(PrunedSource(InMemory(plan.source, model), plan)))


def check_equal(ours: Model, theirs: Model) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def the_identity_changes_nothing(data: st.DataObject, folder) -> None:
    arch = data.draw(shapes())
    model = random_model(arch, 0)
    check_equal(prune(model, identity(arch)), model)


def pruning_twice_is_pruning_by_the_composed_plan(data: st.DataObject, folder) -> None:
    arch = data.draw(shapes())
    first = data.draw(plans(arch))
    second = data.draw(plans(first.target))
    model = random_model(arch, 0)
    check_equal(prune(prune(model, first), second), prune(model, first.then(second)))


def a_plan_survives_writing_and_reading(data: st.DataObject, folder) -> None:
    plan = data.draw(plans(data.draw(shapes())))
    plan.write(folder / "plan.json")
    assert read_plan(folder / "plan.json") == plan


def masked(model: Model, plan: PruningPlan) -> Model:
    """The whole model in which what the plan removes is silent: zero, and layers that go write nothing.

    A norm divides by the root mean square over all channels; kept/full under the root undoes that.
    """
    source, silent = InMemory(plan.source, model), {}
    ratio = plan.target.hidden_size / plan.source.hidden_size
    for name, logical in source.tensors.items():
        tensor = model[name].clone()
        if logical.layer is not None and logical.layer not in plan.layers:
            silent[name] = torch.zeros_like(tensor) if name.endswith(("proj.weight", "fc2.weight")) else tensor
            continue
        place = None if logical.layer is None else plan.layers.index(logical.layer)
        for dimension, dim in enumerate(logical.row.dims):
            kept = {axis: torch.tensor(plan.units(axis, place)) for axis in dim.axes if axis in AXES}
            removed = torch.ones(tensor.shape[dimension], dtype=torch.bool)
            elements = dim.keep(kept, plan.source)
            removed[slice(None) if elements is None else elements] = False
            tensor.index_fill_(dimension, removed.nonzero()[:, 0], 0.0)
        silent[name] = tensor * ratio**0.5 if logical.row.dims == (HIDDEN,) and ratio < 1 else tensor
    return silent


def the_sliced_model_computes_what_the_masked_one_does(data: st.DataObject, folder) -> None:
    arch = data.draw(shapes())
    # The mean of LayerNorm1p counts removed channels too: only RMSNorm has an equal masked model.
    plan = data.draw(plans(arch, whole=() if arch.normalization == "RMSNorm" else ("hidden_size",)))
    model = random_model(arch, 0)
    words = torch.tensor(plan.units("vocab_size") if "vocab_size" in AXES else range(arch.vocab_size))
    tokens = torch.randint(0, len(words), (5,), generator=torch.Generator().manual_seed(0))
    ours = forward(prune(model, plan), plan.target, tokens)
    theirs = forward(masked(model, plan), plan.source, words[tokens])[:, words]
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def every_layout_gives_the_same_slices(data: st.DataObject, folder) -> None:
    plan = data.draw(plans(data.draw(shapes())))
    pruned = PrunedSource(InMemory(plan.source, random_model(plan.source, 0)), plan)
    for name, logical in pruned.tensors.items():
        whole, dimension = pruned.read(name), logical.row.split
        dim = logical.row.dims[dimension or 0]
        of_axis = AXES[dim.axes[0]].size(plan.target) if dim.axes[0] in AXES else getattr(plan.target, dim.axes[0])
        for tp in (1, 2, 4) if dimension is not None else ():
            if of_axis % tp:
                continue
            built = torch.full_like(whole, torch.nan)
            local = whole.shape[dimension] // tp
            for rank in range(tp):
                elements = []
                for piece in dim.tensor_parallel_pieces(local, rank=rank, tp=tp):
                    offset, size = [0] * whole.dim(), list(whole.shape)
                    offset[dimension], size[dimension] = piece.start, piece.length
                    box = Box(tuple(offset), tuple(size))
                    assert built[box.slices()].isnan().all(), "two ranks hold the same"
                    built[box.slices()] = pruned.read(name, box)
                    elements += range(piece.start, piece.start + piece.length)
                mine = torch.arange(rank * of_axis // tp, (rank + 1) * of_axis // tp)
                assert sorted(elements) == dim.keep({dim.axes[0]: mine}, plan.target).tolist(), "units are torn apart"
            assert torch.equal(built, whole), (name, tp)


def pruning_commutes_with_export_and_import(data: st.DataObject, folder) -> None:
    plan = data.draw(plans(data.draw(shapes(least=2)), less=1))
    source = InMemory(plan.source, random_model(plan.source, 0, dtype=torch.float32))
    exported = exports(folder, [source, PrunedSource(source, plan)])
    check_equal(dict(stream(PrunedSource(exported[0], plan))), dict(stream(exported[1])))


def exports(folder, sources: list[TensorSource]) -> list[TensorSource]:
    """Each written as a `.nemo` folder, exported, and opened as a Hugging Face folder."""
    found = []
    for source in sources:
        place = folder / str(len(list(folder.iterdir())))
        tensors = stream(source)
        write_nemo(f"{place}.nemo", source.arch, tensors, dtype=torch.float32, tokenizer=None, origin=Origin("laws"))
        export_hf(open_nemo(f"{place}.nemo"), f"{place}_hf", origin=Origin("laws"))
        found.append(open_hf(f"{place}_hf").weights)
    return found


LAWS = {
    the_identity_changes_nothing: 15,
    pruning_twice_is_pruning_by_the_composed_plan: 25,
    a_plan_survives_writing_and_reading: 25,
    the_sliced_model_computes_what_the_masked_one_does: 25,
    every_layout_gives_the_same_slices: 25,
    pruning_commutes_with_export_and_import: 3,
}


def hold(law, folder, *, examples: int) -> None:
    """The law on examples that are the same in every run."""

    @hypothesis.settings(derandomize=True, database=None, deadline=None, max_examples=examples,
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(st.data())
    def holds(data: st.DataObject) -> None:
        law(data, folder)

    holds()


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_every_axis_of_the_registry_obeys(law, tmp_path):
    CUTS.clear()
    hold(law, tmp_path, examples=LAWS[law])
    assert law is the_identity_changes_nothing or set(CUTS) == set(AXES), "an axis that is never cut proves nothing"


NEW_AXES = [Axis("vocab_size"), Axis("num_query_groups", per_layer=True), Axis("num_query_groups")]


@pytest.mark.parametrize("axis", NEW_AXES, ids=str)
def test_an_axis_registered_later_is_held_to_the_laws(axis, monkeypatch, tmp_path):
    monkeypatch.setitem(AXES, axis.name, axis)
    for law in LAWS:
        CUTS.clear()
        hold(law, tmp_path, examples=1 + LAWS[law] // 3)
        assert law is the_identity_changes_nothing or CUTS[axis.name], law.__name__
