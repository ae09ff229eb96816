"""Plans: the best units are chosen, ties are settled, files are checked."""

import dataclasses
import json
import re

import pytest
import torch

from minitron_nemo.arch import ModelArch
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.pruning.plan import PruningPlan, identity, make_plan, read_plan, top_units

SOURCE = ModelArch(num_layers=5, hidden_size=10, ffn_hidden_size=12, num_attention_heads=8, num_query_groups=2,
                   kv_channels=3, vocab_size=16, seq_length=32)  # fmt: skip
TARGET = SOURCE.shrink(num_layers=3, hidden_size=6, ffn_hidden_size=7, num_attention_heads=4)


def scores_with(arch: ModelArch = SOURCE, *, seed: int = 0, **given: torch.Tensor) -> ImportanceScores:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden_size": (arch.hidden_size,),
        "ffn_hidden_size": (arch.num_layers, arch.ffn_hidden_size),
        "num_attention_heads": (arch.num_layers, arch.num_attention_heads),
        "num_layers": (arch.num_layers,),
    }
    drawn = {axis: torch.rand(shape, generator=generator, dtype=torch.float64) for axis, shape in shapes.items()}
    return ImportanceScores(arch=arch, **(drawn | given), num_samples=4, seq_length=8, sequence_aggregation="mean",
                            batch_aggregation="l2")  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_kept_units_are_the_best_and_of_equals_the_first(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (17,), generator=generator).double()  # many ties
    count = 1 + seed % 17
    ranked = sorted(range(17), key=lambda unit: (-scores[unit].item(), unit))
    assert list(top_units(scores, count)) == sorted(ranked[:count])


@pytest.mark.parametrize("seed", range(10))
def test_no_dropped_unit_scores_above_a_kept_one(seed):
    scores = scores_with(seed=seed)
    plan = make_plan(scores, TARGET)

    def check(values: torch.Tensor, kept: tuple[int, ...], units: range) -> None:
        dropped = set(units) - set(kept)
        assert max((values[u].item() for u in dropped), default=-1.0) <= min(values[u].item() for u in kept)

    check(scores.num_layers, plan.layers, range(5))
    check(scores.hidden_size, plan.hidden_size, range(10))
    for i, layer in enumerate(plan.layers):
        check(scores.ffn_hidden_size[layer], plan.ffn_hidden_size[i], range(12))
        for group in (range(4), range(4, 8)):
            kept = tuple(head for head in plan.num_attention_heads[i] if head in group)
            assert len(kept) == 2
            check(scores.num_attention_heads[layer], kept, group)


def test_heads_compete_only_inside_their_query_group():
    heads = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64).expand(5, 8)
    plan = make_plan(scores_with(num_attention_heads=heads), SOURCE.shrink(num_attention_heads=4))
    assert plan.num_attention_heads == ((0, 1, 6, 7),) * 5


def test_the_lowest_block_importance_goes_first():
    blocks = torch.tensor([0.9, 0.1, 0.3, 0.2, 0.8], dtype=torch.float64)
    assert make_plan(scores_with(num_layers=blocks), SOURCE.shrink(num_layers=3)).layers == (0, 2, 4)


def test_layers_to_drop_count_from_one_and_overrule_the_scores():
    plan = make_plan(scores_with(), SOURCE.shrink(num_layers=3), drop_layers=[4, 2])
    assert plan.layers == (0, 2, 4)
    assert plan.dropped_layers() == [2, 4]


@pytest.mark.parametrize("drop_layers", [[0, 1], [5, 6], [1], [1, 2, 3], [1, 1]])
def test_layers_to_drop_must_exist_and_leave_the_target(drop_layers):
    with pytest.raises(UserError, match="counted from 1 to 5"):
        make_plan(scores_with(), SOURCE.shrink(num_layers=3), drop_layers=drop_layers)


def test_the_published_llama_depth_cut_keeps_layers_1_to_15_and_32():
    source = dataclasses.replace(SOURCE, num_layers=32)
    plan = make_plan(scores_with(source), source.shrink(num_layers=16), drop_layers=list(range(16, 32)))
    assert plan.layers == (*range(15), 31)


@pytest.mark.parametrize("change", [{"vocab_size": 8}, {"kv_channels": 2}, {"activation": "squared_relu"}])
def test_a_target_that_differs_in_more_than_size_is_refused(change):
    with pytest.raises(UserError, match="pruning changes only num_layers"):
        make_plan(scores_with(), dataclasses.replace(TARGET, **change))


def test_a_target_larger_than_the_source_is_refused():
    with pytest.raises(UserError, match=r"hidden_size=11: pruning needs 1\.\.10"):
        make_plan(scores_with(), dataclasses.replace(SOURCE, hidden_size=11))


def test_no_pruning_is_the_identity():
    assert make_plan(scores_with(), SOURCE) == identity(SOURCE)
    assert identity(SOURCE).describe() == "nothing pruned"


@pytest.mark.parametrize("seed", range(5))
def test_identity_before_or_after_changes_no_plan(seed):
    plan = make_plan(scores_with(seed=seed), TARGET)
    assert identity(SOURCE).then(plan) == plan
    assert plan.then(identity(TARGET)) == plan


@pytest.mark.parametrize("seed", range(5))
def test_composition_is_associative(seed):
    first = make_plan(scores_with(seed=seed), SOURCE.shrink(num_layers=4, hidden_size=9, num_attention_heads=6))
    middle = first.target.shrink(num_layers=3, ffn_hidden_size=9, hidden_size=7, num_attention_heads=4)
    second = make_plan(scores_with(first.target, seed=seed + 50), middle)
    last = middle.shrink(num_layers=2, ffn_hidden_size=4, hidden_size=3, num_attention_heads=2)
    third = make_plan(scores_with(middle, seed=seed + 99), last)
    assert first.then(second).then(third) == first.then(second.then(third))


def test_plans_that_do_not_meet_are_refused():
    plan = make_plan(scores_with(), TARGET)
    with pytest.raises(UserError, match="plan.json was made for num_layers=5, hidden_size=10"):
        plan.then(plan)


def test_a_plan_is_refused_for_another_checkpoint_naming_only_what_differs():
    plan = identity(SOURCE)
    plan.check_source(SOURCE)
    with pytest.raises(UserError) as refused:
        plan.check_source(dataclasses.replace(SOURCE, hidden_size=12))
    assert "made for hidden_size=10, the checkpoint is hidden_size=12" in str(refused.value)


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_read_back_is_the_one_written(tmp_path, seed):
    plan = make_plan(scores_with(seed=seed), TARGET)
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


def test_a_person_can_read_the_file(tmp_path):
    plan = make_plan(scores_with(), TARGET)
    plan.write(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert f'    "hidden_size": {list(plan.hidden_size)},\n' in text
    assert len(text.splitlines()) < 25
    assert all(row in text for row in map(str, map(list, plan.ffn_hidden_size)))


def _keep(values: dict, axis: str, change) -> None:
    values["keep"][axis] = change(values["keep"][axis])


DAMAGE = {
    "out of range": (lambda v: _keep(v, "hidden_size", lambda u: [*u[:-1], 10]), "hidden_size must list units of 0..9"),
    "negative": (lambda v: _keep(v, "num_layers", lambda u: [-1, *u[1:]]), "num_layers must list units of 0..4"),
    "not ascending": (lambda v: _keep(v, "hidden_size", lambda u: u[::-1]), "ascending"),
    "twice": (lambda v: _keep(v, "hidden_size", lambda u: [u[0], u[0], *u[2:]]), "ascending"),
    "too few": (lambda v: _keep(v, "hidden_size", lambda u: u[1:]), "keeps 5 units, the target has 6"),
    "a layer short": (lambda v: _keep(v, "ffn_hidden_size", lambda r: r[1:]), "lists 2 layers, the target has 3"),
    "a row short": (lambda v: _keep(v, "ffn_hidden_size", lambda r: [r[0][1:], *r[1:]]), "ffn_hidden_size keeps 6"),
    "uneven groups": (
        lambda v: _keep(v, "num_attention_heads", lambda r: [[0, 1, 2, 4], *r[1:]]),
        "every query group of 4 heads must keep 2",
    ),
    "fraction": (lambda v: _keep(v, "hidden_size", lambda u: [0.0, *u[1:]]), "list of whole numbers"),
    "boolean": (lambda v: _keep(v, "hidden_size", lambda u: [False, *u[1:]]), "list of whole numbers"),
    "not a list": (lambda v: _keep(v, "num_attention_heads", lambda r: 3), "keep.num_attention_heads"),
    "rows not lists": (lambda v: _keep(v, "num_attention_heads", lambda r: [1, 2, 3]), "keep.num_attention_heads"),
    "axis missing": (lambda v: v["keep"].pop("hidden_size"), "keep must have exactly the fields"),
    "axis unknown": (lambda v: v["keep"].update(vocab_size=[1]), "keep must have exactly the fields"),
    "keep not a mapping": (lambda v: v.update(keep=[]), "keep must have exactly the fields"),
    "version": (lambda v: v.update(schema_version=9), "schema_version=9, this version reads 1"),
    "target larger": (lambda v: v["target"].update(hidden_size=11), "pruning needs 1..10"),
    "target of another vocabulary": (lambda v: v["target"].update(vocab_size=8), "differs from its source in more"),
    "source damaged": (lambda v: v["source"].pop("vocab_size"), "source: field 'vocab_size' is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_contradictory_file_is_refused_on_one_line(tmp_path, kind):
    path = tmp_path / "plan.json"
    make_plan(scores_with(), TARGET).write(path)
    values = json.loads(path.read_text())
    damage, message = DAMAGE[kind]
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        read_plan(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_plan_is_refused_by_name(tmp_path, content):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_plan(path)


def test_a_plan_that_contradicts_itself_cannot_be_made():
    with pytest.raises(UserError, match="ascending"):
        dataclasses.replace(identity(SOURCE), hidden_size=tuple(reversed(range(10))))
    assert isinstance(identity(SOURCE), PruningPlan)
