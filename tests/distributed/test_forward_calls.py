"""A pipeline is given several micro-batches at a time, and what is measured stays the same."""

import pytest
from layouts import load_model, samples

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.data.calibration import CalibrationSet
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.engine import schedule
from minitron_nemo.engine.model import BuildOptions
from minitron_nemo.evaluation.perplexity import evaluate
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps.estimate import estimate_importance
from minitron_nemo.testing import ALONE, LLAMA, random_nemo, run_layout
from minitron_nemo.training.objectives import LanguageModelObjective

SAMPLES, SEQ = 11, 8


def measure(groups: Groups, path) -> dict:
    """Cross-entropy, the sums of every axis' scores, and how many micro-batches each call of the schedule had."""
    sizes, original = [], schedule._schedule

    def watched(model, items, forward_step, batches, *rest, **options):
        sizes.append(len(batches))
        return original(model, items, forward_step, batches, *rest, **options)

    schedule._schedule = watched
    source = open_nemo(path)
    head = HeadLoss(vocab_size=source.arch.vocab_size, group=groups.tp)
    result = evaluate(
        load_model(path, groups).eval(),
        LanguageModelObjective(head),
        batch=lambda first, count: samples(source.arch, first=first, count=count, seq_length=SEQ),
        num_samples=SAMPLES,
        micro_batch_size=1,
        groups=groups,
    )
    tokens = samples(source.arch, first=0, count=SAMPLES, seq_length=SEQ)["tokens"]
    scores = estimate_importance(source.weights, CalibrationSet(tokens, "x"), options=BuildOptions(groups=groups))
    schedule._schedule = original
    return {
        "cross_entropy": result.cross_entropy,
        "tokens": result.held_out_tokens,
        "scores": {name: table.flatten().tolist() for name, table in scores.by_axis.items()},
        "sizes": sizes,
    }


def test_a_pipeline_gets_four_micro_batches_for_each_stage_and_measures_the_same(tmp_path):
    path = random_nemo(tmp_path / "m.nemo", LLAMA).path
    alone, pipeline = (run_layout(measure, layout, path) for layout in (ALONE, Layout(pp=2)))
    assert alone["sizes"] == [1] * SAMPLES * 2
    assert pipeline["sizes"] == [8, 3] * 2
    assert pipeline["tokens"] == alone["tokens"]
    assert pipeline["cross_entropy"] == pytest.approx(alone["cross_entropy"], rel=1e-6)
    for name, values in alone["scores"].items():
        assert pipeline["scores"][name] == pytest.approx(values, rel=1e-5), name
