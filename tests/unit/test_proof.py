"""The proof of a cut passes what is right, on every axis, and stops what is wrong before it is published."""

import dataclasses
import itertools
import json

import pytest
import torch
from in_memory import InMemory
from random_scores import random_scores

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.errors import UserError
from minitron_nemo.importance.calibration_text import write_text
from minitron_nemo.pruning import proof
from minitron_nemo.pruning.cut import PrunedSource
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.masked import MaskedModel
from minitron_nemo.pruning.plain_forward import plain_logits
from minitron_nemo.pruning.plan import PruningPlan, identity
from minitron_nemo.pruning.proof import ProofError, prove_cut
from minitron_nemo.shape import packing
from minitron_nemo.shape.axes import AXES, Axis, shrink
from minitron_nemo.shape.packing import Gated, GroupedQuery, Heads, Plain
from minitron_nemo.steps.prune import prune
from minitron_nemo.testing import TINY

SMALLER = {"num_layers": 3, "hidden_size": 36, "ffn_hidden_size": 50, "num_attention_heads": 4}
CASES = [*SMALLER, "all"]
DTYPES = (torch.bfloat16, torch.float32)


def plan_for(arch, axis, seed=3):
    sizes = SMALLER if axis == "all" else {axis: SMALLER[axis]}
    return make_plan(random_scores(arch, seed=seed), shrink(arch, **sizes))


@pytest.fixture(scope="module")
def sources():
    return {(family, dtype): InMemory(arch, dtype) for family, arch in TINY.items() for dtype in DTYPES}


@pytest.mark.parametrize(("family", "dtype", "axis"), list(itertools.product(TINY, DTYPES, CASES)))
def test_a_right_cut_of_every_axis_passes_in_every_family_and_dtype(family, dtype, axis, sources):
    source = sources[family, dtype]
    plan = plan_for(source.arch, axis)
    found = prove_cut(source, PrunedSource(source, plan), plan, samples=2, seq_length=12)
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert found.off <= found.tolerance / 10, "the tolerance leaves room"
    assert found.block_off <= found.block_tolerance / 4
    assert found.top1_agreement == 1
    assert found.max_difference >= found.mean_difference


@pytest.mark.parametrize("family", TINY)
def test_the_logits_compared_are_those_of_both_models_and_nothing_is_removed_by_the_identity(family, sources):
    """The statistics against whole logits, of two models that differ."""
    source = sources[family, torch.float32]
    plan = plan_for(source.arch, "all")
    statistics = proof._LogitStatistics()
    theirs, ours = torch.randn(2, 3, 131), torch.randn(2, 3, 131)
    for first in range(0, 131, 50):
        statistics.add(first, theirs[..., first : first + 50], ours[..., first : first + 50])
    difference = (ours - theirs).abs()
    assert statistics.largest == pytest.approx(float(difference.max()))
    assert statistics.mean == pytest.approx(float(difference.mean()))
    assert statistics.off == pytest.approx(float(difference.square().mean().sqrt() / theirs.square().mean().sqrt()))
    assert statistics.top1_agreement == pytest.approx(float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()))
    apart = torch.zeros(2, 1, 1, 131)
    apart[0, ..., 3], apart[1, ..., 53] = 1, 1
    statistics = proof._LogitStatistics()
    for first in range(0, 131, 50):
        statistics.add(first, *apart[..., first : first + 50])
    assert statistics.top1_agreement == 0, "the same place of two pieces is not the same word"
    whole = identity(source.arch)
    assert prove_cut(source, source, whole, samples=1, seq_length=8).off < 1e-6
    masked, unmasked = MaskedModel(source, plan), MaskedModel(source, whole)
    x = unmasked.embed(torch.arange(8)[None])
    layer = plan.layers[0]
    assert not torch.allclose(masked.mlp(layer, x), unmasked.mlp(layer, x), rtol=1e-2), "a mask that masks nothing"


def test_the_logits_in_the_proof_are_those_of_two_whole_forward_passes(sources, monkeypatch):
    """Of a student that is off, and let pass, so that its own residual stream is not the source's."""
    source = sources["nemotron", torch.float32]
    plan = plan_for(source.arch, "all")
    student = InMemory(plan.target, torch.float32)
    student.model = dict(stream(PrunedSource(source, plan)))
    student.model["decoder.layers.0.mlp.linear_fc2.weight"] *= 1.1
    monkeypatch.setitem(proof.TOLERANCES, torch.float32, 1.0)
    found = prove_cut(source, student, plan, samples=2, seq_length=12, seed=5)
    tokens = torch.randint(0, 131, (2, 12), generator=torch.Generator().manual_seed(5))
    masked = MaskedModel(source, plan)
    x = masked.embed(tokens)
    for layer in plan.layers:
        x = x + masked.attention(layer, x)
        x = x + masked.mlp(layer, x)
    theirs = masked.logits(masked.final_norm(x), 0, 131)
    difference = (plain_logits(student, tokens) - theirs).abs()
    assert found.max_difference == pytest.approx(float(difference.max()), rel=1e-4)
    assert found.worst_block == "the MLP of layer 1"
    assert found.block_off == pytest.approx(0.1, rel=1e-3)
    assert found.off == pytest.approx(
        float(difference.square().mean().sqrt() / theirs.square().mean().sqrt()), rel=1e-4
    )


def next_head(kept, arch):
    heads = kept["num_attention_heads"].clone()
    heads[0] = heads[0] // arch.heads_per_group * arch.heads_per_group + (heads[0] + 1) % arch.heads_per_group
    return heads


def up_of_the_next_neuron(self, kept, arch):
    units, size = kept.get(self.axis), self._units(arch)
    return None if units is None else torch.cat((units, (units + size + 1).clamp_max(2 * size - 1)))


def one_neuron_off(self, kept, arch):
    units = kept.get(self.axis)
    if units is None or self.axis != "ffn_hidden_size":
        return units
    spare = next(unit for unit in range(arch.ffn_hidden_size) if unit not in units)
    return torch.cat((torch.tensor([spare]), units[1:]))


def values_from_keys(self, kept, arch):
    if "num_attention_heads" not in kept:
        return None
    blocks = arch.heads_per_group + 2
    heads, groups = kept["num_attention_heads"], torch.arange(arch.num_query_groups)
    queries = heads // arch.heads_per_group * blocks + heads % arch.heads_per_group
    keys = groups * blocks + arch.heads_per_group
    return packing._channels(torch.cat((queries, keys, keys)).sort().values, arch)


def another_head(self, kept, arch):
    return packing._channels(next_head(kept, arch), arch) if "num_attention_heads" in kept else None


# what is put in the place of a packing's `keep`, and whether the family has such a tensor
WRONG = {
    "gates with the up rows of the next neuron": (Gated, up_of_the_next_neuron, ("llama", "mistral")),
    "one wrong neuron of fc2": (Plain, one_neuron_off, tuple(TINY)),
    "values cut from the keys": (GroupedQuery, values_from_keys, tuple(TINY)),
    "one wrong head of the output projection": (Heads, another_head, tuple(TINY)),
}


@pytest.mark.parametrize(("fault", "dtype"), list(itertools.product(WRONG, DTYPES)))
def test_a_wrong_cut_is_stopped(fault, dtype, sources, monkeypatch):
    where, wrong, families = WRONG[fault]
    monkeypatch.setattr(where, "keep", wrong)
    for family in families:
        source = sources[family, dtype]
        plan = plan_for(source.arch, "all")
        with pytest.raises(ProofError, match=r"(attention|MLP) of layer 1 .* does not compute"):
            prove_cut(source, PrunedSource(source, plan), plan, samples=2, seq_length=12)


@pytest.mark.parametrize(
    ("broken", "block"),
    [
        ("embedding.word_embeddings.weight", "the embedding"),
        ("decoder.layers.1.self_attention.linear_qkv.layer_norm_weight", "the attention of layer 2"),
        ("decoder.layers.2.mlp.linear_fc1.layer_norm_weight", "the MLP of layer 3"),
        ("decoder.final_layernorm.weight", "the output head"),
        ("output_layer.weight", "the output head"),
    ],
)
def test_one_channel_of_one_tensor_is_enough_and_is_named(broken, block, sources):
    source = sources["llama", torch.bfloat16]
    plan = plan_for(source.arch, "all")
    student = InMemory(plan.target, torch.bfloat16)
    student.model = dict(stream(PrunedSource(source, plan)))
    student.model[broken] = student.model[broken].clone()
    student.model[broken][..., 0] *= 1.5
    with pytest.raises(ProofError, match=block):
        prove_cut(source, student, plan, samples=2, seq_length=12)


def test_the_students_own_logits_are_gated_too(sources, monkeypatch):
    """Blocks that agree on the source's residual stream prove nothing of a student that never follows it."""
    source = sources["llama", torch.float32]
    plan = plan_for(source.arch, "all")
    student = PrunedSource(source, plan)
    monkeypatch.setattr(proof, "AMPLIFICATION", 1e-9)
    with pytest.raises(ProofError, match="logits of the pruned model are off"):
        prove_cut(source, student, plan, samples=1, seq_length=8)


def test_words_are_ignored_by_the_plan_when_the_vocabulary_is_an_axis(sources, monkeypatch):
    monkeypatch.setitem(AXES, "vocab_size", Axis("vocab_size"))
    source = sources["mistral", torch.float32]
    plan = make_plan_of_words(source.arch, 77)
    assert prove_cut(source, PrunedSource(source, plan), plan, samples=2, seq_length=12).top1_agreement == 1
    others = dataclasses.replace(plan, keep=plan.keep | {"vocab_size": (tuple(range(77)),)})
    with pytest.raises(ProofError, match="the embedding"):
        prove_cut(source, PrunedSource(source, others), plan, samples=2, seq_length=12)


def make_plan_of_words(arch, words):
    kept = sorted(torch.randperm(arch.vocab_size, generator=torch.Generator().manual_seed(0))[:words].tolist())
    whole = identity(arch)
    return dataclasses.replace(
        whole, target=shrink(arch, vocab_size=words), keep=whole.keep | {"vocab_size": (tuple(kept),)}
    )


def test_an_axis_without_a_mask_is_refused_by_name(sources, monkeypatch):
    source = sources["llama", torch.float32]
    plan = plan_for(source.arch, "hidden_size")
    monkeypatch.setattr("minitron_nemo.pruning.masked.MASKED_AXES", ("num_layers",))
    with pytest.raises(UserError, match="hidden_size has no mask.*set prune.proof=false"):
        prove_cut(source, PrunedSource(source, plan), plan)


def test_a_source_that_is_not_finite_is_no_fault_of_the_cut(sources):
    source = InMemory(TINY["llama"], torch.float32)
    source.model["decoder.layers.0.mlp.linear_fc2.weight"][0, 0] = torch.inf
    plan = identity(source.arch)
    with pytest.raises(UserError, match="not finite in the MLP of layer 1") as refusal:
        prove_cut(source, PrunedSource(source, plan), plan)
    assert not isinstance(refusal.value, ProofError)


@pytest.fixture
def teacher(tmp_path, sources):
    source = sources["llama", torch.bfloat16]
    write_nemo(tmp_path / "teacher.nemo", source.arch, stream(source), dtype=torch.bfloat16, tokenizer=None,
               origin=Origin("t"))  # fmt: skip
    return open_nemo(tmp_path / "teacher.nemo")


def test_what_was_found_is_in_the_manifest_and_can_be_skipped(teacher, tmp_path):
    plan = plan_for(teacher.arch, "all")
    proven = prune(teacher, plan, tmp_path / "proven.nemo")
    facts = proven.manifest.extra["proof"]
    assert facts == prove_cut(teacher.weights, proven.weights, plan).to_dict()
    assert facts["samples"] == 2
    assert facts["seq_length"] == 32
    assert json.loads(proven.manifest.to_json())["extra"]["proof"]["top1_agreement"] == 1
    unproven = prune(teacher, plan, tmp_path / "unproven.nemo", proof=False)
    assert "proof" not in unproven.manifest.extra
    assert unproven.manifest.fingerprint == proven.manifest.fingerprint, "the same model"


def test_the_proof_runs_on_calibration_text_where_the_scores_have_some(teacher, tmp_path, monkeypatch, caplog):
    plan, text = plan_for(teacher.arch, "all"), torch.arange(2 * 40).reshape(2, 40)
    seen, embed = [], proof.PlainModel.embed
    monkeypatch.setattr(proof.PlainModel, "embed", lambda self, tokens: seen.append(tokens) or embed(self, tokens))
    (tmp_path / "scores").mkdir()
    caplog.set_level("INFO")
    blind = prune(teacher, plan, tmp_path / "blind.nemo", text_from=tmp_path / "scores")
    assert blind.manifest.extra["proof"]["tokens"] == "random"
    assert "on random tokens: " + str(tmp_path / "scores") + " has no calibration text" in caplog.text
    seen.clear()
    write_text(tmp_path / "scores", text)
    proven = prune(teacher, plan, tmp_path / "proven.nemo", text_from=tmp_path / "scores")
    assert proven.manifest.extra["proof"]["tokens"] == "calibration"
    assert all(torch.equal(tokens, text[:, :32]) for tokens in seen)
    assert len(seen) == 2, "both models"
    write_text(tmp_path / "scores", text + teacher.arch.vocab_size)
    with pytest.raises(UserError, match="ids that the model does not have"):
        prune(teacher, plan, tmp_path / "never.nemo", text_from=tmp_path / "scores")
    assert not (tmp_path / "never.nemo").exists()


def test_of_text_the_words_that_went_are_left_out_and_too_little_is_not_taken():
    words, text = torch.tensor([2, 3, 5, 7]), torch.tensor([[7, 0, 2, 5, 3], [5, 5, 1, 3, 2]])
    assert torch.equal(proof._of_student(text, words, (2, 3)), torch.tensor([[3, 0, 2], [2, 2, 1]]))
    assert proof._of_student(text, words, (2, 5)) is None
    assert proof._of_student(text, words, (3, 2)) is None


def test_a_wrong_cut_leaves_nothing_behind(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(PrunedSource, "_origin", lambda self, name: name)  # layers are not counted anew
    target = shrink(teacher.arch, num_layers=3)
    plan = PruningPlan(teacher.arch, target, identity(target).keep | {"num_layers": ((0, 2, 3),)})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ProofError, match="attention of layer 2.*nothing was published"):
        prune(teacher, plan, tmp_path / "wrong.nemo")
    assert sorted(path for path in tmp_path.iterdir() if path.suffix != ".lock") == before
    prune(teacher, plan, tmp_path / "wrong.nemo", proof=False)


def test_what_was_written_is_what_is_proven(teacher, tmp_path, monkeypatch):
    """A writer that loses a tensor's values is seen, though the cut is right."""
    from minitron_nemo.checkpoint import torch_dist_weights

    right = torch_dist_weights.TorchDistWriter.write

    def wrong(self, key, chunk, **where):
        right(self, key, chunk.roll(1, -1) if key.endswith("fc2.weight") else chunk, **where)

    monkeypatch.setattr(torch_dist_weights.TorchDistWriter, "write", wrong)
    with pytest.raises(ProofError, match="MLP of layer 1"):
        prune(teacher, plan_for(teacher.arch, "hidden_size"), tmp_path / "student.nemo")
