"""Who sends which hidden states of the teacher to whom: laws over all kinds of splits."""

import itertools
import random

import pytest

from minitron_nemo.distributed.layout import Layout
from minitron_nemo.distributed.routes import Route, routes, stage_of
from minitron_nemo.shape.taps import EMBEDDINGS, KINDS, Pair, Tap, pairs_of

DEPTHS = {"student": 8, "teacher": 16}


def split(drawn: random.Random, layers: int, chunks: int) -> list[int]:
    cuts = sorted(drawn.sample(range(1, layers), chunks - 1))
    return [stop - start for start, stop in itertools.pairwise([0, *cuts, layers])]


def test_every_stage_gets_the_states_that_its_pairs_need_once_and_no_others():
    drawn = random.Random(1)
    for _ in range(200):
        pp, vpp = drawn.choice([(1, 1), (2, 1), (4, 1), (2, 2), (4, 2)])
        chunks = {role: split(drawn, depth, pp * vpp) for role, depth in DEPTHS.items()}
        some = drawn.sample(range(DEPTHS["student"]), drawn.randint(1, DEPTHS["student"]))
        pairs = pairs_of(drawn.sample(KINDS, 2), {s: drawn.randrange(DEPTHS["teacher"]) for s in some})
        found = routes(pairs, **chunks, stages=pp)
        assert len(set(found)) == len(found)
        layout = Layout(pp=pp, vpp=vpp)
        layers = {  # of each stage, from what the layout says of its chunks
            role: {stage: {layer for number in layout.chunks_of(stage)
                           for layer in range(sum(split[:number]), sum(split[: number + 1]))} for stage in range(pp)}
            for role, split in chunks.items()
        }  # fmt: skip
        for stage in range(pp):
            wanted = {pair.teacher for pair in pairs if is_on(pair.student, stage, layers["student"])}
            assert sorted(route.tap for route in found if route.target == stage) == sorted(wanted)
        assert all(is_on(route.tap, route.source, layers["teacher"]) for route in found)


def is_on(tap, stage, layers):
    return stage == 0 if tap.kind == EMBEDDINGS else tap.layer in layers[stage]


def test_without_a_pipeline_and_between_embeddings_nothing_is_sent():
    for route in routes(pairs_of(KINDS, {0: 1, 1: 3}), student=[2], teacher=[4], stages=1):
        assert route.source == route.target == 0
    (embeddings,) = routes(pairs_of([EMBEDDINGS], {}), student=[1, 3], teacher=[4, 4], stages=2)
    assert embeddings == Route(0, 0, Tap(EMBEDDINGS))


def test_a_depth_student_beside_a_teacher_of_twice_the_layers():
    """Layers 0 and 1 of three on stage 0 were layers 0 and 3 of six, the latter on stage 1."""
    found = routes(pairs_of(["layer_outputs"], {0: 0, 1: 3, 2: 5}), student=[2, 1], teacher=[3, 3], stages=2)
    assert [(r.source, r.target, r.tap.layer) for r in found] == [(0, 0, 0), (1, 0, 3), (1, 1, 5)]


def test_two_student_layers_beside_one_teacher_layer_get_it_once():
    found = routes(pairs_of(["mlp_outputs"], {2: 0, 3: 0}), student=[2, 2], teacher=[1, 3], stages=2)
    assert found == (Route(0, 1, Tap("mlp_outputs", 0)),)


def test_a_layer_that_the_model_has_not_is_on_no_stage():
    with pytest.raises(IndexError):
        stage_of(Tap("layer_outputs", 4), [2, 2], stages=2)


def test_pairs_are_of_one_kind_and_embeddings_are_one():
    pairs = pairs_of([EMBEDDINGS, "layer_outputs"], {1: 3, 0: 2})
    assert pairs == (
        Pair(Tap(EMBEDDINGS), Tap(EMBEDDINGS)),
        Pair(Tap("layer_outputs", 0), Tap("layer_outputs", 2)),
        Pair(Tap("layer_outputs", 1), Tap("layer_outputs", 3)),
    )
    assert [str(pair) for pair in pairs] == ["1:1", "3:1", "4:2"], "teacher first, counted from 1"
