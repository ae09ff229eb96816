"""Overlap of kept units: counted by hand, between folders and within the samples of one."""

import dataclasses
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from fake_megatron import ARCH, FakeModel, random_tapes, select_samples
from random_scores import random_scores

from minitron_nemo.errors import UserError
from minitron_nemo.importance.hooks import listening
from minitron_nemo.importance.scores import by_samples, scores_of
from minitron_nemo.importance.sums import Heard, ImportanceSums, stretches
from minitron_nemo.reporting.overlap import format_overlaps, overlaps, write_overlaps
from minitron_nemo.shape.axes import shrink

TARGET = shrink(ARCH, num_layers=2, hidden_size=6, ffn_hidden_size=4, num_attention_heads=4)


def test_the_overlap_is_the_share_of_kept_units_in_common_in_each_layer():
    a, b = random_scores(ARCH, seed=1), random_scores(ARCH, seed=2)
    found = {one.axis: one for one in overlaps({"a": a, "b": b}, TARGET)}
    assert list(found) == ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"]
    for axis, count in (("num_layers", 2), ("hidden_size", 6), ("ffn_hidden_size", 4)):
        rows = zip(a[axis].reshape(-1, a[axis].shape[-1]), b[axis].reshape(-1, b[axis].shape[-1]), strict=True)
        expected = [len({*x.topk(count).indices.tolist()} & {*y.topk(count).indices.tolist()}) / count for x, y in rows]
        assert found[axis].shares == pytest.approx(expected)
    pairs = [(a["num_attention_heads"][n].view(4, 2), b["num_attention_heads"][n].view(4, 2)) for n in range(4)]
    assert found["num_attention_heads"].shares == pytest.approx(
        [float((x.argmax(1) == y.argmax(1)).double().mean()) for x, y in pairs]
    ), "heads compete inside their query group"
    assert found["ffn_hidden_size"].chance == 0.25
    assert found["hidden_size"].above_chance == pytest.approx((found["hidden_size"].mean - 0.5) / 0.5)


def test_scores_agree_with_themselves_and_not_with_their_opposite():
    a = random_scores(ARCH, seed=1)
    opposite = dataclasses.replace(a, by_axis={axis: -scores for axis, scores in a.by_axis.items()})
    same, against = (overlaps({"a": a, "b": b}, TARGET) for b in (a, opposite))
    assert {one.mean for one in same} == {1.0} == {one.above_chance for one in same}
    assert {one.mean for one in against} == {0.0}


def test_every_pair_is_compared_and_what_cannot_be_is_refused():
    scores = {name: random_scores(ARCH, seed=seed) for seed, name in enumerate("abc")}
    found = overlaps(scores, shrink(ARCH, hidden_size=6))
    assert [(one.axis, one.ours, one.theirs) for one in found] == [
        ("hidden_size", "a", "b"), ("hidden_size", "a", "c"), ("hidden_size", "b", "c"),
    ]  # fmt: skip
    with pytest.raises(UserError, match="prune.target cuts nothing that was scored"):
        overlaps(scores, ARCH)
    other = random_scores(dataclasses.replace(ARCH, vocab_size=64))
    with pytest.raises(UserError, match="d: scores of another model than a"):
        overlaps(scores | {"d": other}, TARGET)


def sums_over(samples: int) -> ImportanceSums:
    model, tapes = FakeModel([1, 2, 3, 4]), random_tapes(ARCH, seq=3, batch=samples, seed=1)
    with listening(model, arch=ARCH) as statistics:
        sums = ImportanceSums(ARCH, statistics.criteria, "mean", Heard("d", samples, 3))
        for stretch in stretches(range(samples), set_samples=samples, at_most=64):
            model(select_samples(tapes, slice(stretch.start, stretch.stop)))
            sums = sums.add(statistics.take(stretch))
    return sums


def test_how_many_samples_are_enough_is_in_the_sums_of_one_run(tmp_path):
    sums = sums_over(16)
    scores = by_samples(sums, "l2")
    assert list(scores) == ["2 samples", "4 samples", "8 samples", "16 samples"]
    assert torch.equal(scores["16 samples"]["hidden_size"], scores_of(sums, "l2")["hidden_size"])
    found = overlaps(scores, shrink(ARCH, ffn_hidden_size=4, hidden_size=6))
    assert "8 samples / 16 samples" in format_overlaps(found)
    with pytest.raises(UserError, match="in one part: only sets whose size is a multiple of 8"):
        by_samples(sums_over(9), "l2")
    written = write_overlaps(found, tmp_path / "overlap.json")
    assert [path.name for path in written] == [
        "overlap.json", "overlap_hidden_size.svg", "overlap_ffn_hidden_size.svg",
    ]  # fmt: skip
    records = json.loads(written[0].read_text())["overlaps"]
    assert len(records) == 12
    assert len(records[-1]["shares"]) == ARCH.num_layers
    for picture in written[1:]:
        text = "".join(ElementTree.parse(picture).getroot().itertext())
        assert "2 samples / 16 samples" in text
