"""Plans: the best units are chosen, ties are settled, files are checked."""

import dataclasses
import json
import re

import pytest
import torch
from random_scores import random_scores

from minitron_nemo.errors import UserError
from minitron_nemo.pruning.make_plan import make_plan, top_units
from minitron_nemo.pruning.plan import PruningPlan, identity, read_plan
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES, FIRST_AXES, shrink

SOURCE = ModelArch(num_layers=5, hidden_size=10, ffn_hidden_size=12, num_attention_heads=8, num_query_groups=2,
                   kv_channels=3, vocab_size=16, seq_length=32)  # fmt: skip
TARGET = shrink(SOURCE, num_layers=3, hidden_size=6, ffn_hidden_size=7, num_attention_heads=4)


@pytest.mark.parametrize("seed", range(20))
def test_kept_units_are_the_best_and_of_equals_the_first(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 5, (17,), generator=generator).double()  # many ties
    count = 1 + seed % 17
    ranked = sorted(range(17), key=lambda unit: (-scores[unit].item(), unit))
    assert list(top_units(scores, count)) == sorted(ranked[:count])


@pytest.mark.parametrize("seed", range(10))
def test_no_dropped_unit_scores_above_a_kept_one(seed):
    scores = random_scores(SOURCE, seed=seed)
    plan = make_plan(scores, TARGET)

    def check(values: torch.Tensor, kept: tuple[int, ...], units: range) -> None:
        dropped = set(units) - set(kept)
        assert max((values[u].item() for u in dropped), default=-1.0) <= min(values[u].item() for u in kept)

    check(scores["num_layers"], plan.layers, range(5))
    check(scores["hidden_size"], plan.units("hidden_size"), range(10))
    for i, layer in enumerate(plan.layers):
        check(scores["ffn_hidden_size"][layer], plan.units("ffn_hidden_size", i), range(12))
        for group in (range(4), range(4, 8)):
            kept = tuple(head for head in plan.units("num_attention_heads", i) if head in group)
            assert len(kept) == 2
            check(scores["num_attention_heads"][layer], kept, group)


def test_heads_compete_only_inside_their_query_group():
    heads = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64).expand(5, 8)
    plan = make_plan(random_scores(SOURCE, num_attention_heads=heads), shrink(SOURCE, num_attention_heads=4))
    assert plan.keep["num_attention_heads"] == ((0, 1, 6, 7),) * 5


def test_the_lowest_block_importance_goes_first():
    blocks = torch.tensor([0.9, 0.1, 0.3, 0.2, 0.8], dtype=torch.float64)
    assert make_plan(random_scores(SOURCE, num_layers=blocks), shrink(SOURCE, num_layers=3)).layers == (0, 2, 4)


def test_layers_to_drop_count_from_one_and_overrule_the_scores():
    plan = make_plan(random_scores(SOURCE), shrink(SOURCE, num_layers=3), drop_layers=[4, 2])
    assert plan.layers == (0, 2, 4)
    assert plan.dropped_layers() == [2, 4]


@pytest.mark.parametrize("drop_layers", [[0, 1], [5, 6], [1], [1, 2, 3], [1, 1]])
def test_layers_to_drop_must_exist_and_leave_the_target(drop_layers):
    with pytest.raises(UserError, match="counted from 1 to 5"):
        make_plan(random_scores(SOURCE), shrink(SOURCE, num_layers=3), drop_layers=drop_layers)


def test_the_published_llama_depth_cut_keeps_layers_1_to_15_and_32():
    source = dataclasses.replace(SOURCE, num_layers=32)
    plan = make_plan(random_scores(source), shrink(source, num_layers=16), drop_layers=list(range(16, 32)))
    assert plan.layers == (*range(15), 31)


@pytest.mark.parametrize("change", [{"seq_length": 8}, {"kv_channels": 2}, {"activation": "squared_relu"}])
def test_a_target_that_differs_in_more_than_size_is_refused(change):
    with pytest.raises(UserError, match="pruning changes only num_layers"):
        make_plan(random_scores(SOURCE), dataclasses.replace(TARGET, **change))


def test_a_target_larger_than_the_source_is_refused():
    with pytest.raises(UserError, match=r"hidden_size=11: pruning needs 1\.\.10"):
        make_plan(random_scores(SOURCE), dataclasses.replace(SOURCE, hidden_size=11))


def test_no_pruning_is_the_identity():
    assert make_plan(random_scores(SOURCE), SOURCE) == identity(SOURCE)
    assert identity(SOURCE).describe() == "nothing pruned"


@pytest.mark.parametrize("seed", range(5))
def test_identity_before_or_after_changes_no_plan(seed):
    plan = make_plan(random_scores(SOURCE, seed=seed), TARGET)
    assert identity(SOURCE).then(plan) == plan
    assert plan.then(identity(TARGET)) == plan


@pytest.mark.parametrize("seed", range(5))
def test_composition_is_associative(seed):
    first = make_plan(
        random_scores(SOURCE, seed=seed), shrink(SOURCE, num_layers=4, hidden_size=9, num_attention_heads=6)
    )
    middle = shrink(first.target, num_layers=3, ffn_hidden_size=9, hidden_size=7, num_attention_heads=4)
    second = make_plan(random_scores(first.target, seed=seed + 50), middle)
    last = shrink(middle, num_layers=2, ffn_hidden_size=4, hidden_size=3, num_attention_heads=2)
    third = make_plan(random_scores(middle, seed=seed + 99), last)
    assert first.then(second).then(third) == first.then(second.then(third))


def test_the_units_of_a_composed_plan_are_those_of_the_layers_that_stay():
    """The second cut drops the first two layers; each layer of the first kept neurons of its own."""
    narrow = shrink(SOURCE, ffn_hidden_size=3)
    own = {"ffn_hidden_size": tuple((layer, layer + 1, layer + 2) for layer in range(5))}
    first = PruningPlan(SOURCE, narrow, identity(narrow).keep | own)
    small = shrink(narrow, num_layers=3, ffn_hidden_size=2)
    stay = {"num_layers": ((2, 3, 4),), "ffn_hidden_size": ((0, 2),) * 3}
    second = PruningPlan(narrow, small, identity(small).keep | stay)
    both = first.then(second)
    assert both.layers == (2, 3, 4)
    assert both.keep["ffn_hidden_size"] == ((2, 4), (3, 5), (4, 6))


def test_plans_that_do_not_meet_are_refused():
    plan = make_plan(random_scores(SOURCE), TARGET)
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
    plan = make_plan(random_scores(SOURCE, seed=seed), TARGET)
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


def test_a_person_can_read_the_file(tmp_path):
    plan = make_plan(random_scores(SOURCE), TARGET)
    plan.write(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert f'    "hidden_size": {list(plan.units("hidden_size"))},\n' in text
    assert len(text.splitlines()) < 25
    assert all(row in text for row in map(str, map(list, plan.keep["ffn_hidden_size"])))


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
        "keeps [0, 1, 2, 4], but each of the 2 num_query_groups, which hold 4, must keep 2",
    ),
    "fraction": (lambda v: _keep(v, "hidden_size", lambda u: [0.0, *u[1:]]), "list of whole numbers"),
    "boolean": (lambda v: _keep(v, "hidden_size", lambda u: [False, *u[1:]]), "list of whole numbers"),
    "not a list": (lambda v: _keep(v, "num_attention_heads", lambda r: 3), "keep.num_attention_heads"),
    "rows not lists": (lambda v: _keep(v, "num_attention_heads", lambda r: [1, 2, 3]), "keep.num_attention_heads"),
    "axis missing": (lambda v: v["keep"].pop("hidden_size"), "keep must have exactly the fields"),
    "axis unknown": (lambda v: v["keep"].update(kv_channels=[1]), "keep must have exactly the fields"),
    "keep not a mapping": (lambda v: v.update(keep=[]), "keep must have exactly the fields"),
    "version": (lambda v: v.update(schema_version=9), "schema_version=9, this version reads 1"),
    "target larger": (lambda v: v["target"].update(hidden_size=11), "pruning needs 1..10"),
    "target of other channels": (lambda v: v["target"].update(kv_channels=2), "differs from its source in more"),
    "target of another vocabulary": (lambda v: v["target"].update(vocab_size=8), "vocab_size keeps 16 units"),
    "source damaged": (lambda v: v["source"].pop("vocab_size"), "source: field 'vocab_size' is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_contradictory_file_is_refused_on_one_line(tmp_path, kind):
    path = tmp_path / "plan.json"
    make_plan(random_scores(SOURCE), TARGET).write(path)
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


def with_rows(plan: PruningPlan, **rows) -> PruningPlan:
    return dataclasses.replace(plan, keep=plan.keep | rows)


def test_a_plan_that_contradicts_itself_cannot_be_made():
    plan = identity(SOURCE)
    whole = plan.units("hidden_size")
    assert with_rows(plan, hidden_size=(whole,)) == plan
    with pytest.raises(UserError, match="ascending"):
        with_rows(plan, hidden_size=(tuple(reversed(range(10))),))
    with pytest.raises(UserError, match="hidden_size lists 2 rows of units, there must be 1"):
        with_rows(plan, hidden_size=(whole, whole))
    with pytest.raises(UserError, match="exactly the fields"):
        dataclasses.replace(plan, keep={"hidden_size": (whole,)})


def test_units_are_asked_for_by_axis_and_layer():
    plan = make_plan(random_scores(SOURCE), TARGET)
    assert plan.units("hidden_size") == plan.units("hidden_size", 2) == plan.keep["hidden_size"][0]
    assert plan.units("num_layers") == plan.layers
    assert plan.units("ffn_hidden_size", 2) == plan.keep["ffn_hidden_size"][2]
    with pytest.raises(KeyError, match="kv_channels"):
        plan.units("kv_channels", 0)
    with pytest.raises(KeyError, match="every layer keeps its own"):
        plan.units("ffn_hidden_size")


OLD_FILE = """{
  "schema_version": 1,
  "source": {"num_layers": 3, "hidden_size": 3, "ffn_hidden_size": 2, "num_attention_heads": 4, "num_query_groups": 2, \
"kv_channels": 1, "vocab_size": 4, "seq_length": 8, "family": "llama", "activation": "swiglu", "normalization": \
"RMSNorm", "norm_epsilon": 1e-05, "rotary_base": 10000.0, "rotary_percent": 1.0, "rope_scaling": null, \
"share_embeddings_and_output_weights": false},
  "target": {"num_layers": 2, "hidden_size": 2, "ffn_hidden_size": 1, "num_attention_heads": 2, "num_query_groups": 2, \
"kv_channels": 1, "vocab_size": 4, "seq_length": 8, "family": "llama", "activation": "swiglu", "normalization": \
"RMSNorm", "norm_epsilon": 1e-05, "rotary_base": 10000.0, "rotary_percent": 1.0, "rope_scaling": null, \
"share_embeddings_and_output_weights": false},
  "keep": {
    "num_layers": [0, 2],
    "hidden_size": [0, 2],
    "ffn_hidden_size": [
      [1],
      [0]
    ],
    "num_attention_heads": [
      [0, 3],
      [1, 2]
    ]
  }
}
"""


def test_a_file_of_the_first_version_is_read_and_written_the_same_to_the_byte(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(OLD_FILE)
    plan = read_plan(path)
    assert plan.keep == {"num_layers": ((0, 2),), "hidden_size": ((0, 2),), "ffn_hidden_size": ((1,), (0,)),
                         "num_attention_heads": ((0, 3), (1, 2)), "num_query_groups": ((0, 1),) * 2,
                         "vocab_size": ((0, 1, 2, 3),)}  # fmt: skip
    assert plan.to_json() == OLD_FILE


@pytest.mark.parametrize("axis", [AXES[name] for name in AXES if name not in FIRST_AXES])
def test_an_older_file_keeps_everything_of_an_axis_registered_since_and_stays_the_same_text(tmp_path, axis):
    path = tmp_path / "plan.json"
    path.write_text(OLD_FILE)
    plan = read_plan(path)
    everything = tuple(range(axis.size(plan.source)))
    assert plan.keep[axis.name] == (everything,) * (2 if axis.per_layer else 1)
    assert plan.to_json() == OLD_FILE


def test_an_axis_that_was_not_scored_is_kept_whole_or_refused_by_name():
    scores = random_scores(SOURCE)
    scores = dataclasses.replace(scores, by_axis={axis: scores[axis] for axis in FIRST_AXES})
    assert make_plan(scores, TARGET).units("vocab_size") == tuple(range(16))
    with pytest.raises(UserError, match="importance of vocab_size: not scored, only num_layers, hidden_size"):
        make_plan(scores, shrink(SOURCE, vocab_size=8))
