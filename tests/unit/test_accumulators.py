"""Accumulators and the hooks that feed them, on a model that replays known activations."""

import dataclasses
import itertools

import pytest
import torch
from fake_megatron import ARCH, FakeModel, random_tapes, select_samples
from torch import nn

from minitron_nemo.distributed.spread import Spread, by_layer, merge
from minitron_nemo.importance.accumulators import CosineSums, Hearing, UnitMoments
from minitron_nemo.importance.criteria import scores_in_each_layer
from minitron_nemo.importance.estimators import (
    AGGREGATIONS,
    aggregate,
    block_importance,
    cosine_sum,
    head_norms,
    moments,
)
from minitron_nemo.importance.hooks import listening
from minitron_nemo.importance.sites import LAYER, NEURONS

ALL = list(range(1, ARCH.num_layers + 1))
AXES = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_layers")


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def assert_same_scores(ours, theirs):
    assert ours.by_axis.keys() == theirs.by_axis.keys() == set(AXES)
    for axis in AXES:
        torch.testing.assert_close(ours[axis], theirs[axis], rtol=1e-10, atol=1e-12)
    assert (ours.num_samples, ours.seq_length) == (theirs.num_samples, theirs.seq_length)


def scores_of(tapes, *, arch=ARCH, sequence="mean", batch="l2", **options):
    model = FakeModel(ALL, **options)
    with listening(model, arch=arch, sequence_aggregation=sequence) as statistics:
        model(tapes)
    return statistics.finish(batch)


@pytest.mark.parametrize("spread", list(Spread))
def test_merging_alone_changes_nothing(spread):
    x = torch.randn(3, 4)
    assert merge(x, spread, None) is x


def test_rows_land_at_their_global_layer():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    table = by_layer(rows, [2, 0], num_layers=3, group=None)
    assert table.tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]


@pytest.mark.parametrize(("sequence", "batch"), list(itertools.product(AGGREGATIONS, AGGREGATIONS)))
def test_one_sample_at_a_time_equals_one_batch(sequence, batch):
    x_SBU = torch.randn(9, 6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    hearing = Hearing(layers=2, units=5, sequence_aggregation=sequence)
    together, apart = UnitMoments(NEURONS, hearing), UnitMoments(NEURONS, hearing)
    for row in range(2):
        together.add(row, x_SBU * (row + 1))
        for b in range(6):
            apart.add(row, x_SBU[:, b : b + 1] * (row + 1))
    ours, theirs = (scores_in_each_layer([units.merged()], batch) for units in (together, apart))
    assert ours.shape == (2, 5)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert together.heard().tolist() == apart.heard().tolist() == [[6, 54], [6, 54]]


@pytest.mark.parametrize(("statistic", "site"), [(UnitMoments, NEURONS), (CosineSums, LAYER)])
def test_a_statistic_counts_samples_and_tokens_of_each_layer(statistic, site):
    heard = statistic(site, Hearing(layers=3, units=5))
    inputs = 2 if site is LAYER else 1
    for row, (length, samples) in ((0, (7, 2)), (2, (3, 4)), (0, (7, 1))):
        heard.add(row, *[torch.ones(length, samples, 5)] * inputs)
    assert heard.heard().tolist() == [[3, 21], [0, 0], [4, 12]]


def test_activations_of_another_width_are_refused_and_not_counted():
    units = UnitMoments(NEURONS, Hearing(layers=1, units=5))
    with pytest.raises(ValueError, match=r"expected \[s, b, 5\]"):
        units.add(0, torch.ones(2, 3, 1))
    assert units.heard().tolist() == [[0, 0]]


@pytest.mark.parametrize(("sequence", "batch"), [("mean", "l2"), ("l2", "variance"), ("variance", "mean")])
@pytest.mark.parametrize("seed", range(3))
def test_listening_scores_what_each_axis_is_defined_on(seed, sequence, batch):
    tapes = random_tapes(ARCH, seq=6, batch=3, seed=seed)
    scores = scores_of(tapes, sequence=sequence, batch=batch)

    def score(x):
        return aggregate(moments(aggregate(moments(x), sequence)), batch)

    hidden = sum(score(tape.norm_1) + score(tape.norm_2) for tape in tapes)
    torch.testing.assert_close(scores["hidden_size"], hidden)
    for layer, tape in enumerate(tapes):
        torch.testing.assert_close(scores["ffn_hidden_size"][layer], score(tape.neurons))
        torch.testing.assert_close(
            scores["num_attention_heads"][layer], score(head_norms(tape.attention, ARCH.kv_channels))
        )
        torch.testing.assert_close(scores["num_layers"][layer], block_importance(cosine_sum(tape.before, tape.after)))
    assert (scores.num_samples, scores.seq_length) == (3, 6)
    assert (scores.sequence_aggregation, scores.batch_aggregation) == (sequence, batch)


def test_forward_passes_add_up_whatever_the_micro_batch():
    tapes = random_tapes(ARCH, seq=6, batch=5, seed=0)
    model = FakeModel(ALL)
    with listening(model, arch=ARCH) as statistics:
        for samples in (slice(0, 2), slice(2, 3), slice(3, 5)):
            model(select_samples(tapes, samples))
    assert_same_scores(statistics.finish(), scores_of(tapes))


def test_one_pass_serves_every_batch_aggregation():
    tapes = random_tapes(ARCH, seq=6, batch=5, seed=0)
    model = FakeModel(ALL)
    with listening(model, arch=ARCH) as statistics:
        model(tapes)
    for batch in AGGREGATIONS:
        assert_same_scores(statistics.finish(batch), scores_of(tapes, batch=batch))


def test_wrapped_models_virtual_chunks_and_tuple_outputs_are_heard_alike():
    tapes = random_tapes(ARCH, seq=4, batch=2, seed=1)
    expected = scores_of(tapes)
    wrapper, outer = nn.Module(), nn.Module()
    wrapper.module = FakeModel(ALL)
    outer.module = wrapper
    chunks = [FakeModel([1, 3]), FakeModel([2, 4])]
    for heard, runs in ((outer, [wrapper.module]), (chunks, chunks)):
        with listening(heard, arch=ARCH) as statistics:
            for model in runs:
                model(tapes)
        assert_same_scores(statistics.finish(), expected)
    assert_same_scores(scores_of(tapes, norm_returns_tuple=True), expected)


def test_hooks_are_gone_after_the_with_and_after_an_exception():
    model, tapes = FakeModel(ALL), random_tapes(ARCH, seq=4, batch=2, seed=1)
    with listening(model, arch=ARCH) as statistics:
        assert hooks_of(model) == 6 * ARCH.num_layers
        model(tapes)
    assert hooks_of(model) == 0
    before = statistics.finish()
    model(tapes)
    assert_same_scores(statistics.finish(), before)

    with pytest.raises(KeyboardInterrupt), listening(model, arch=ARCH):
        raise KeyboardInterrupt
    assert hooks_of(model) == 0


def test_hooks_are_gone_when_attaching_fails_half_way():
    model = FakeModel(ALL)
    del model.decoder.layers[2].mlp.linear_fc2
    with pytest.raises(AttributeError), listening(model, arch=ARCH):
        pass
    assert hooks_of(model) == 0


def test_listening_does_not_keep_the_graph_of_the_activations():
    model, tapes = FakeModel(ALL), random_tapes(ARCH, seq=4, batch=2, seed=1)
    for tape in tapes:
        for activation in vars(tape).values():
            activation.requires_grad_()
    with listening(model, arch=ARCH) as statistics:
        model(tapes)
    heard = [statistic for axis in statistics.statistics.values() for statistic in axis]
    assert len(heard) == 6
    assert all(statistic.values.any() and not statistic.values.requires_grad for statistic in heard)


@pytest.mark.parametrize("numbers", [[1, 2, 3], [1, 2, 3, 3]], ids=["missing", "twice"])
def test_a_layer_missing_or_counted_twice_is_refused(numbers):
    tapes = random_tapes(ARCH, seq=4, batch=2, seed=1)
    model = FakeModel(numbers)
    with listening(model, arch=ARCH) as statistics:
        model(tapes)
    with pytest.raises(RuntimeError, match="samples heard"):
        statistics.finish()


def test_a_site_that_missed_a_sample_is_refused_by_its_name():
    tapes = random_tapes(ARCH, seq=4, batch=2, seed=1)
    model = FakeModel(ALL)
    with listening(model, arch=ARCH) as statistics:
        model(tapes)
        model.decoder.layers[1].mlp.linear_fc2(tapes[1].neurons)
    with pytest.raises(RuntimeError, match=r"'ffn_hidden_size at linear_fc2': \[\[2, 8\], \[4, 16\]"):
        statistics.finish()


def test_a_site_that_heard_slices_of_the_sequence_is_refused():
    tapes = random_tapes(ARCH, seq=4, batch=2, seed=1)
    halved = [dataclasses.replace(tape, neurons=tape.neurons[:2]) for tape in tapes]
    model = FakeModel(ALL)
    with listening(model, arch=ARCH) as statistics:
        model(halved)
    with pytest.raises(RuntimeError, match="tokens equal"):
        statistics.finish()


def test_finishing_before_any_sample_is_refused():
    with listening(FakeModel(ALL), arch=ARCH) as statistics:
        pass
    with pytest.raises(RuntimeError, match="at least one"):
        statistics.finish()


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm1p"])
def test_a_fused_norm_is_scored_like_the_norm_apart(normalization):
    arch = dataclasses.replace(ARCH, normalization=normalization, norm_epsilon=1e-3)
    tapes = random_tapes(arch, seq=4, batch=3, seed=2)
    fused = FakeModel(ALL)
    generator = torch.Generator().manual_seed(5)
    for layer in fused.decoder.layers:
        for projection in (layer.self_attention.linear_qkv, layer.mlp.linear_fc1):
            projection.layer_norm_weight = nn.Parameter(torch.randn(arch.hidden_size, generator=generator))
            projection.layer_norm_bias = nn.Parameter(torch.randn(arch.hidden_size, generator=generator))

    def norm(x, projection):
        if normalization == "RMSNorm":
            return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * projection.layer_norm_weight
        centered = x - x.mean(-1, keepdim=True)
        scale = (centered.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        return centered / scale * (1 + projection.layer_norm_weight) + projection.layer_norm_bias

    normed = [
        dataclasses.replace(
            tape,
            norm_1=norm(tape.norm_1, layer.self_attention.linear_qkv).detach(),
            norm_2=norm(tape.norm_2, layer.mlp.linear_fc1).detach(),
        )
        for tape, layer in zip(tapes, fused.decoder.layers, strict=True)
    ]
    with listening(fused, arch=arch) as statistics:
        fused(tapes)
    torch.testing.assert_close(
        statistics.finish()["hidden_size"], scores_of(normed, arch=arch)["hidden_size"], rtol=1e-5, atol=1e-6
    )
