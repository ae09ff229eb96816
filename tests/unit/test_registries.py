"""An axis more is a row more and a criterion more is a record more: no other code knows of either."""

import dataclasses
import json

import pytest
import torch
from fake_megatron import ARCH, FakeModel, random_tapes
from random_scores import random_scores
from torch import Tensor

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import ShapedSource
from minitron_nemo.config.importance import CriteriaConfig
from minitron_nemo.config.setting import setting_of
from minitron_nemo.distributed.spread import Spread
from minitron_nemo.errors import UserError
from minitron_nemo.importance.accumulators import UnitMoments
from minitron_nemo.importance.criteria import CRITERIA, KNOWN, Criterion, chosen, names_of, scores_in_each_layer
from minitron_nemo.importance.estimators import aggregate, moments
from minitron_nemo.importance.hooks import listening
from minitron_nemo.importance.scores import read_scores
from minitron_nemo.importance.sites import Site, input_of
from minitron_nemo.pruning.cut import PrunedSource
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.pruning.plan import PruningPlan, identity, read_plan
from minitron_nemo.shape.axes import AXES, Axis, shrink

GROUPS = AXES["num_query_groups"]


class Drawn(ShapedSource):
    """Random weights of the tiny model."""

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, box: Box | None = None) -> Tensor:
        generator = torch.Generator().manual_seed(self.names().index(name))
        tensor = torch.randn(self.shape(name), generator=generator)
        return tensor if box is None else tensor[box.slices()]


def channels(heads: list[int]) -> list[int]:
    return [head * ARCH.kv_channels + channel for head in heads for channel in range(ARCH.kv_channels)]


def check_groups_cut(plan: PruningPlan, source: Drawn) -> None:
    """Each layer of the pruned model, against Hugging Face's way of naming the rows: q, k and v apart."""
    pruned = PrunedSource(source, plan)
    for place, layer in enumerate(plan.layers):
        groups, heads = (list(plan.units(axis, place)) for axis in ("num_query_groups", "num_attention_heads"))
        name = "decoder.layers.{}.self_attention.{}.weight"
        qkv = source.read(name.format(layer, "linear_qkv"))
        rows = qkv.unflatten(0, (ARCH.num_query_groups, ARCH.heads_per_group + 2, ARCH.kv_channels))
        expected = []
        for group in groups:
            mine = [head % ARCH.heads_per_group for head in heads if head // ARCH.heads_per_group == group]
            expected += [*rows[group, mine].flatten(0, 1), *rows[group, -2], *rows[group, -1]]
        assert torch.equal(pruned.read(name.format(place, "linear_qkv")), torch.stack(expected))
        projection = source.read(name.format(layer, "linear_proj"))
        assert torch.equal(pruned.read(name.format(place, "linear_proj")), projection[:, channels(heads)])
    assert torch.equal(pruned.read("output_layer.weight"), source.read("output_layer.weight"))


def test_query_groups_are_pruned_with_their_heads(tmp_path):
    target = shrink(ARCH, num_query_groups=2, num_attention_heads=4)
    keep = identity(target).keep | {
        "num_query_groups": ((0, 2), (1, 3), (2, 3), (0, 1)),
        "num_attention_heads": ((0, 1, 4, 5), (2, 3, 6, 7), (4, 5, 6, 7), (0, 1, 2, 3)),
    }
    plan = PruningPlan(ARCH, target, keep)
    check_groups_cut(plan, Drawn(ARCH))
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert plan.describe() == "num_attention_heads 8 -> 4; num_query_groups 4 -> 2"
    assert identity(ARCH).then(plan) == plan == plan.then(identity(target))
    with pytest.raises(UserError, match="keeps .*, but each of the 2 num_query_groups"):
        PruningPlan(ARCH, target, keep | {"num_query_groups": ((1, 3),) * 4})


@pytest.mark.parametrize("seed", range(4))
def test_heads_compete_inside_the_groups_that_stay(seed):
    scores = random_scores(ARCH, seed=seed)
    plan = make_plan(scores, shrink(ARCH, num_layers=3, num_query_groups=2, num_attention_heads=2))
    for place, layer in enumerate(plan.layers):
        best = sorted(scores["num_query_groups"][layer].topk(2).indices.tolist())
        assert list(plan.units("num_query_groups", place)) == best
        heads = [2 * group + int(scores["num_attention_heads"][layer][2 * group : 2 * group + 2].argmax())
                 for group in best]  # fmt: skip
        assert list(plan.units("num_attention_heads", place)) == heads
    check_groups_cut(plan, Drawn(ARCH))
    again = make_plan(random_scores(plan.target, seed=seed), shrink(plan.target, num_query_groups=1,
                                                                    num_attention_heads=1))  # fmt: skip
    twice = PrunedSource(PrunedSource(Drawn(ARCH), plan), again)
    once = PrunedSource(Drawn(ARCH), plan.then(again))
    assert all(torch.equal(once.read(name), twice.read(name)) for name in once.names())


def test_one_choice_of_groups_serves_every_layer_where_the_axis_says_so(monkeypatch):
    monkeypatch.setitem(AXES, GROUPS.name, Axis("num_query_groups"))
    scores = random_scores(ARCH, num_query_groups=torch.tensor([1.0, 4.0, 2.0, 3.0]))
    plan = make_plan(scores, shrink(ARCH, num_query_groups=2, num_attention_heads=4))
    assert plan.keep["num_query_groups"] == ((1, 3),)
    assert plan.keep["num_attention_heads"] == ((2, 3, 6, 7),) * ARCH.num_layers
    check_groups_cut(plan, Drawn(ARCH))


def test_words_are_pruned_from_both_tables(tmp_path):
    words = (0, 3, 4, 9, 31)
    target = shrink(ARCH, vocab_size=5)
    plan = PruningPlan(ARCH, target, identity(target).keep | {"vocab_size": (words,)})
    source = Drawn(ARCH)
    pruned = PrunedSource(source, plan)
    for name in pruned.names():
        whole = source.read(name)
        expected = whole[list(words)] if name in ("embedding.word_embeddings.weight", "output_layer.weight") else whole
        assert torch.equal(pruned.read(name), expected), name
    plan.write(tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert '"vocab_size": [0, 3, 4, 9, 31]' in plan.to_json()
    with pytest.raises(UserError, match=r"vocab_size must list units of 0\.\.31"):
        PruningPlan(ARCH, target, identity(target).keep | {"vocab_size": ((0, 3, 4, 9, 32),)})


def group_norms(x_SBC: Tensor, arch) -> Tensor:
    return x_SBC.unflatten(-1, (arch.num_query_groups, -1)).norm(dim=-1)


GROUP_SITE = Site("groups", input_of("self_attention.linear_proj", group_norms), Spread.SHARDED, Spread.REPLICATED)
GROUP_CRITERION = Criterion("num_query_groups", (GROUP_SITE,), UnitMoments, scores_in_each_layer)


def test_a_criterion_more_is_a_record_more(tmp_path):
    tapes = random_tapes(ARCH, seq=6, batch=3, seed=4)
    model = FakeModel([1, 2, 3, 4])
    with listening(model, arch=ARCH, criteria=CRITERIA | {GROUPS.name: GROUP_CRITERION}) as statistics:
        model(tapes)
    scores = statistics.finish("variance")
    assert set(scores.by_axis) == {*CRITERIA, GROUPS.name}
    for layer, tape in enumerate(tapes):
        groups = [piece.norm(dim=-1) for piece in tape.attention.chunk(ARCH.num_query_groups, dim=-1)]
        expected = aggregate(moments(aggregate(moments(torch.stack(groups, dim=-1)), "mean")), "variance")
        torch.testing.assert_close(scores[GROUPS.name][layer], expected)
    scores.write(tmp_path)
    back = read_scores(tmp_path)
    assert all(torch.equal(back[axis], scores[axis]) for axis in scores.by_axis)
    rows = json.loads((tmp_path / "scores.json").read_text())["layers"]
    assert rows[2][GROUPS.name]["max"] == pytest.approx(float(scores[GROUPS.name][2].max()), rel=1e-5)
    plan = make_plan(back, shrink(ARCH, num_query_groups=2, num_attention_heads=4))
    assert plan.units(GROUPS.name, 1) == tuple(sorted(scores[GROUPS.name][1].topk(2).indices.tolist()))


def test_criteria_can_be_fewer_and_the_others_are_neither_heard_nor_scored():
    model = FakeModel([1, 2, 3, 4])
    with listening(model, arch=ARCH, criteria={"num_layers": CRITERIA["num_layers"]}) as statistics:
        assert not any(layer.mlp.linear_fc2._forward_pre_hooks for layer in model.decoder.layers)
        model(random_tapes(ARCH, seq=6, batch=3, seed=4))
    scores = statistics.finish()
    assert list(scores.by_axis) == ["num_layers"]
    assert (scores.num_samples, scores.seq_length) == (3, 6)


def test_every_criterion_scores_an_axis_of_the_registry_under_its_name():
    assert set(CRITERIA) <= set(AXES)
    assert all(name == criterion.axis for name, criterion in CRITERIA.items())


def test_every_criterion_has_a_name_of_its_own_and_the_settings_name_them_all():
    fields = {field.name: field for field in dataclasses.fields(CriteriaConfig)}
    assert set(fields) == {criterion.axis for criterion in KNOWN}
    for axis, field in fields.items():
        assert names_of(axis) == [field.default, *(name for name in setting_of(field).choices if name != field.default)]
    assert CriteriaConfig().named() == {}
    assert CriteriaConfig(num_layers="taylor").named() == {"num_layers": "taylor"}


def test_query_groups_are_scored_where_they_are_an_axis(monkeypatch):
    monkeypatch.delitem(AXES, GROUPS.name, raising=False)
    assert GROUPS.name not in chosen()
    with pytest.raises(UserError, match="num_query_groups: no axis that is scored; there are num_layers"):
        chosen({GROUPS.name: "channel_norm"})
    monkeypatch.setitem(AXES, GROUPS.name, GROUPS)
    assert chosen()[GROUPS.name].name == "token_norm"
    assert chosen({GROUPS.name: "taylor"})[GROUPS.name].gradients
    with pytest.raises(UserError, match="num_query_groups by the criterion 'taste': allowed are token_norm, channel"):
        chosen({GROUPS.name: "taste"})


def test_a_gradient_of_a_norm_that_is_fused_into_its_projection_is_refused():
    model = FakeModel([1, 2, 3, 4])
    model.decoder.layers[2].mlp.linear_fc1.layer_norm_weight = torch.ones(ARCH.hidden_size)
    with (
        pytest.raises(UserError, match=r"pre_mlp_layernorm is fused into mlp\.linear_fc1"),
        listening(model, arch=ARCH, criteria=chosen({"hidden_size": "taylor"})),
    ):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_listening_for_gradients_without_a_backward_pass_is_noticed():
    model = FakeModel([1, 2, 3, 4])
    with listening(model, arch=ARCH, criteria=chosen({"ffn_hidden_size": "taylor"})) as statistics:
        model(random_tapes(ARCH, seq=6, batch=3, seed=4))
    with pytest.raises(RuntimeError, match="ffn_hidden_size at linear_fc2_gradient"):
        statistics.finish()
