"""Sums: what several jobs heard adds up to what one would have heard, and what does not belong together is refused."""

import dataclasses
import json
import random

import pytest
import torch
from fake_megatron import ARCH, FakeModel, random_tapes, select_samples
from safetensors import safe_open
from safetensors.torch import save_file

from minitron_nemo.errors import UserError
from minitron_nemo.importance.criteria import chosen
from minitron_nemo.importance.estimators import AGGREGATIONS
from minitron_nemo.importance.hooks import listening
from minitron_nemo.importance.scores import read_scores, scores_of
from minitron_nemo.importance.sums import Heard, ImportanceSums, eighths, merged, read_sums, stretches

SET = 16
HEARD = Heard(data="d" * 64, set_samples=SET, seq_length=6, tokenizer="t" * 64, model="m" * 64, precision="fp32")
TAPES = random_tapes(ARCH, seq=6, batch=SET, seed=11)


def heard_of(samples: range, *, at_most: int = SET, tapes=TAPES) -> ImportanceSums:
    """The sums of a job over these samples, one sample in a forward pass."""
    model = FakeModel([1, 2, 3, 4])
    with listening(model, arch=ARCH) as statistics:
        sums = ImportanceSums(ARCH, statistics.criteria, "mean", HEARD)
        for stretch in stretches(samples, set_samples=SET, at_most=at_most):
            for sample in stretch:
                model(select_samples(tapes, slice(sample, sample + 1)))
            sums = sums.add(statistics.take(stretch))
    return sums


@pytest.fixture(scope="module")
def whole():
    return heard_of(range(SET))


@pytest.fixture(scope="module")
def halves():
    return heard_of(range(8)), heard_of(range(8, 16))


def tables(sums):
    return [table for part in sums.parts for axis in part.tables.values() for table in axis]


def assert_same_bits(ours, theirs):
    assert [(part.first, part.end) for part in ours.parts] == [(part.first, part.end) for part in theirs.parts]
    assert all(torch.equal(a, b) for a, b in zip(tables(ours), tables(theirs), strict=True))


@pytest.mark.parametrize("batch", AGGREGATIONS)
def test_sums_come_to_the_scores_of_one_pass_by_every_batch_aggregation(whole, batch):
    model = FakeModel([1, 2, 3, 4])
    with listening(model, arch=ARCH) as statistics:
        model(TAPES)
    expected, scores = statistics.finish(batch, data_fingerprint=HEARD.data), scores_of(whole, batch)
    for axis in expected.by_axis:
        torch.testing.assert_close(scores[axis], expected[axis], rtol=1e-12, atol=1e-14)
    facts = [field.name for field in dataclasses.fields(expected) if field.name != "by_axis"]
    assert all(getattr(scores, name) == getattr(expected, name) for name in facts)


def test_a_set_is_cut_in_eighths_and_the_same_wherever_a_job_begins(whole):
    assert [(part.first, part.end) for part in whole.parts] == [(0, 2), (2, 4), (4, 8), (8, 16)]
    assert eighths(12) == ()
    assert stretches(range(5, 16), set_samples=16, at_most=3) == [
        range(5, 6), range(6, 8), range(8, 9), range(9, 12), range(12, 15), range(15, 16),
    ]  # fmt: skip
    for seed in range(20):
        drawn = random.Random(seed)
        size, at_most = drawn.randint(1, 70), drawn.randint(1, 80)
        first = drawn.randrange(size)
        found = [sample for part in stretches(range(first, size), set_samples=size, at_most=at_most) for sample in part]
        assert found == list(range(first, size))


@pytest.mark.parametrize("at_most", [3, 16])
def test_jobs_that_meet_at_a_cut_add_up_to_one_run_bit_for_bit(whole, at_most):
    one = heard_of(range(SET), at_most=at_most)
    jobs = [heard_of(range(*ends), at_most=at_most) for ends in ((8, 16), (0, 4), (4, 8))]
    assert_same_bits(merged(dict(zip("abc", jobs, strict=True))), one)
    torch.testing.assert_close(tables(one), tables(whole), rtol=1e-13, atol=0)


def test_jobs_that_meet_anywhere_add_up_to_one_run_to_the_rounding_of_float64(whole):
    both = merged({"a": heard_of(range(11, 16)), "b": heard_of(range(11))})
    assert [(part.first, part.end) for part in both.parts] == [(part.first, part.end) for part in whole.parts]
    torch.testing.assert_close(tables(both), tables(whole), rtol=1e-13, atol=0)
    assert both.num_samples == SET


def test_samples_may_be_left_out_and_come_later():
    a, b, c = heard_of(range(3)), heard_of(range(5, 8)), heard_of(range(3, 5))
    gap = merged({"a": a, "b": b})
    assert (gap.samples, gap.num_samples) == ("0..2, 5..7", 6)
    assert merged({"gap": gap, "c": c}).samples == "0..7"


def test_the_first_samples_are_scored_alone(whole):
    for end in (2, 4, 8):
        expected = scores_of(heard_of(range(end)), "l2")
        found = scores_of(whole.first(end), "l2")
        assert found.num_samples == end
        assert all(torch.equal(found[axis], expected[axis]) for axis in expected.by_axis)
    with pytest.raises(UserError, match="no part ends at sample 5: parts end at 2, 4, 8, 16"):
        whole.first(5)


def test_the_file_says_what_was_heard_and_reads_back_bit_for_bit(whole, tmp_path):
    whole.write(tmp_path)
    back = read_sums(tmp_path)
    assert_same_bits(back, whole)
    assert (back.arch, back.criteria, back.heard) == (ARCH, whole.criteria, HEARD)
    with safe_open(tmp_path / "sums.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        assert "num_attention_heads.linear_proj.000003" in file.keys()  # noqa: SIM118
    assert (facts["samples"], facts["tokens"], facts["parts"][1]) == (SET, SET * 6, [2, 4])
    assert facts["sites"]["hidden_size"] == ["input_layernorm", "pre_mlp_layernorm"]
    assert facts["criteria"]["num_layers"] == "cosine"


def test_scores_are_finished_anew_from_their_sums_and_only_from_them(whole, tmp_path):
    scores_of(whole, "l2").write(tmp_path)
    with pytest.raises(UserError, match="sums.safetensors: not there"):
        read_scores(tmp_path, batch_aggregation="variance")
    whole.write(tmp_path)
    anew, expected = read_scores(tmp_path, batch_aggregation="variance"), scores_of(whole, "variance")
    assert anew.batch_aggregation == "variance"
    assert all(torch.equal(anew[axis], expected[axis]) for axis in expected.by_axis)
    assert read_scores(tmp_path, batch_aggregation="l2").batch_aggregation == "l2"


def other(sums, **heard):
    return dataclasses.replace(sums, heard=dataclasses.replace(sums.heard, **heard))


NOT_TOGETHER = {
    "another model": (lambda s: other(s, model="x" * 64), "b: model xxxxxxxxxxxx, a has mmmmmmmmmmmm"),
    "another tokenizer": (lambda s: other(s, tokenizer="x" * 64), "tokenizer xxxxxxxxxxxx"),
    "other data": (lambda s: other(s, data="x" * 64), "calibration data xxxxxxxxxxxx"),
    "a set of another size": (lambda s: other(s, set_samples=24), "calibration set of samples 24"),
    "another precision": (lambda s: other(s, precision="bf16"), "precision 'bf16'"),
    "another aggregation": (lambda s: dataclasses.replace(s, sequence_aggregation="l2"), "sequence_aggregation 'l2'"),
    "an axis less": (
        lambda s: dataclasses.replace(s, criteria=chosen(only=["num_layers"])), "criterion of hidden_size None",
    ),
    "another shape": (
        lambda s: dataclasses.replace(s, arch=dataclasses.replace(ARCH, vocab_size=64)), "model of vocab_size 64",
    ),
    "samples twice": (lambda s: heard_of(range(7, 9)), "b: samples 7..7 of the calibration set are in a too"),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_TOGETHER)
def test_what_does_not_add_up_is_refused_by_name(halves, kind):
    change, message = NOT_TOGETHER[kind]
    with pytest.raises(UserError) as refused:
        merged({"a": halves[0], "b": change(halves[1])})
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def _rewrite(folder, facts=lambda facts: facts, tensors=lambda tensors: tensors):
    path = folder / "sums.safetensors"
    with safe_open(path, "pt") as file:
        known = json.loads(file.metadata()["facts"])
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors(held), path, metadata={"facts": json.dumps(facts(known))})


def _with(key, value):
    return lambda values: values | {key: value}


KEY = "hidden_size.input_layernorm.000000"
DAMAGE = {
    "half a file": (lambda folder: (folder / "sums.safetensors").write_bytes(
        (folder / "sums.safetensors").read_bytes()[:5000]), "cannot be read"),
    "no facts": (lambda folder: save_file({KEY: torch.ones(1)}, folder / "sums.safetensors"), "schema version 1"),
    "version": (lambda folder: _rewrite(folder, _with("schema_version", 9)), "schema version 1"),
    "facts of another form": (lambda folder: _rewrite(folder, _with("heard", {"data": 1})), "facts are damaged"),
    "parts outside the set": (lambda folder: _rewrite(folder, _with("parts", [[0, 99]])), "facts are damaged"),
    "overlapping parts": (
        lambda folder: _rewrite(folder, _with("parts", [[0, 2], [1, 4], [4, 8], [8, 16]])), "samples 1..1",
    ),
    "an unknown criterion": (
        lambda folder: _rewrite(folder, _with("criteria", {"num_layers": "taste"})), "by the criterion 'taste'",
    ),
    "an unknown axis": (lambda folder: _rewrite(folder, _with("criteria", {"colour": "cosine"})), "colour: no axis"),
    "a tensor missing": (
        lambda folder: _rewrite(folder, tensors=lambda t: {k: v for k, v in t.items() if k != KEY}), "is missing",
    ),
    "a tensor too many": (
        lambda folder: _rewrite(folder, tensors=_with("more", torch.ones(1))), "'more' is of no site",
    ),
    "another shape": (lambda folder: _rewrite(folder, tensors=_with(KEY, torch.ones(4, 4, 3).double())), "needs torch"),
    "float32": (lambda folder: _rewrite(folder, tensors=_with(KEY, torch.ones(4, 4, 12))), "torch.float32"),
    "not finite": (
        lambda folder: _rewrite(folder, tensors=_with(KEY, torch.full((4, 4, 12), torch.nan).double())),
        "not all finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_refused_on_one_line_that_names_it(whole, tmp_path, kind):
    whole.write(tmp_path)
    damage, message = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(UserError) as refused:
        read_sums(tmp_path)
    assert message in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_job_that_missed_a_sample_is_noticed():
    model = FakeModel([1, 2, 3, 4])
    with listening(model, arch=ARCH) as statistics:
        model(select_samples(TAPES, slice(0, 3)))
        with pytest.raises(RuntimeError, match="heard 3 samples, not the 4 from 0 on"):
            statistics.take(range(4))
