"""The scores file: what is written is read back, what is damaged is refused on one line."""

import dataclasses
import json

import pytest
import torch
from random_scores import random_scores
from safetensors.torch import load_file, save_file

from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ImportanceScores, read_scores
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES, FIRST_AXES

ARCH = ModelArch(num_layers=3, hidden_size=8, ffn_hidden_size=10, num_attention_heads=4, num_query_groups=2,
                 kv_channels=2, vocab_size=32, seq_length=64)  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_scores_read_back_are_the_ones_written_bit_for_bit(tmp_path, seed):
    scores = random_scores(ARCH, seed=seed)
    scores.write(tmp_path)
    back = read_scores(tmp_path)
    assert back.by_axis.keys() == scores.by_axis.keys() == AXES.keys()
    for axis in AXES:
        assert back[axis].dtype == torch.float64
        assert torch.equal(back[axis], scores[axis])
    facts = [field.name for field in dataclasses.fields(ImportanceScores) if field.name != "by_axis"]
    assert all(getattr(back, name) == getattr(scores, name) for name in facts)


SCORED_IN_LAYERS = [name for name, axis in AXES.items() if axis.per_layer]


def test_tensors_are_named_by_axis_and_layer(tmp_path):
    random_scores(ARCH).write(tmp_path)
    whole = [name for name, axis in AXES.items() if not axis.per_layer]
    layers = [f"{axis}.layer_{i:02d}" for axis in SCORED_IN_LAYERS for i in range(3)]
    assert sorted(load_file(tmp_path / "scores.safetensors")) == sorted([*whole, *layers])


def test_the_table_counts_layers_from_one_and_shows_their_block_importance(tmp_path):
    scores = random_scores(ARCH)
    scores.write(tmp_path)
    facts = json.loads((tmp_path / "scores.json").read_text())
    assert [row["layer"] for row in facts["layers"]] == [1, 2, 3]
    assert [row["block_importance"] for row in facts["layers"]] == pytest.approx(
        scores["num_layers"].tolist(), rel=1e-5
    )
    assert facts["num_samples"] == 16


def test_criteria_that_are_not_the_defaults_are_said_and_layers_are_then_called_by_theirs(tmp_path):
    scores = dataclasses.replace(random_scores(ARCH), criteria={"num_layers": "taylor"})
    scores.write(tmp_path)
    facts = json.loads((tmp_path / "scores.json").read_text())
    assert facts["criteria"] == {"num_layers": "taylor"} == read_scores(tmp_path).criteria
    assert "layer_taylor" in facts["layers"][0]
    assert "block_importance" not in facts["layers"][0]


@pytest.mark.parametrize("axis", AXES)
def test_scores_that_are_not_finite_or_misshapen_are_refused_by_axis(axis):
    scores = random_scores(ARCH)
    broken = scores[axis].clone()
    broken.view(-1)[1] = float("nan")
    with pytest.raises(UserError, match=rf"{axis}: not all finite"):
        dataclasses.replace(scores, by_axis=scores.by_axis | {axis: broken})
    with pytest.raises(UserError, match=rf"{axis}: shape"):
        dataclasses.replace(scores, by_axis=scores.by_axis | {axis: broken[..., 1:]})


def test_scores_of_no_axis_are_refused_and_an_axis_without_scores_is_named():
    scores = random_scores(ARCH)
    with pytest.raises(UserError, match="importance of kv_channels: not a prunable axis"):
        dataclasses.replace(scores, by_axis={"kv_channels": torch.ones(2)})
    with pytest.raises(UserError, match="importance of hidden_size: not scored, only num_layers"):
        dataclasses.replace(scores, by_axis={"num_layers": torch.ones(3)})["hidden_size"]


def test_the_facts_say_which_axes_were_scored_only_where_they_are_others_than_the_first_four(tmp_path):
    everything = random_scores(ARCH)
    of_few = dataclasses.replace(everything, by_axis={"hidden_size": everything["hidden_size"]})
    of_four = dataclasses.replace(everything, by_axis={axis: everything[axis] for axis in FIRST_AXES})
    for name, scores, axes in (
        ("all", everything, list(AXES)),
        ("few", of_few, ["hidden_size"]),
        ("four", of_four, None),
    ):
        (tmp_path / name).mkdir()
        scores.write(tmp_path / name)
        assert json.loads((tmp_path / name / "scores.json").read_text()).get("axes") == axes
        back = read_scores(tmp_path / name)
        assert back.by_axis.keys() == scores.by_axis.keys()
        assert all(torch.equal(back[axis], scores[axis]) for axis in scores.by_axis)


OLD_FACTS = {
    "schema_version": 1,
    "num_samples": 16,
    "seq_length": 32,
    "sequence_aggregation": "mean",
    "batch_aggregation": "l2",
    "data_fingerprint": "abc",
    "arch": {
        "num_layers": 1, "hidden_size": 2, "ffn_hidden_size": 3, "num_attention_heads": 2, "num_query_groups": 1,
        "kv_channels": 1, "vocab_size": 4, "seq_length": 8, "family": "llama", "activation": "swiglu",
        "normalization": "RMSNorm", "norm_epsilon": 1e-05, "rotary_base": 10000.0, "rotary_percent": 1.0,
        "rope_scaling": None, "share_embeddings_and_output_weights": False,
    },
    "layers": [{
        "layer": 1,
        "block_importance": 0.333333,
        "num_attention_heads": [1.0, 2.5],
        "ffn_hidden_size": {"min": 1.0, "median": 2.0, "max": 4.0},
    }],
}  # fmt: skip
OLD_TENSORS = {
    "num_layers": [1 / 3], "hidden_size": [5.0, 6.0], "ffn_hidden_size.layer_00": [4.0, 1.0, 2.0],
    "num_attention_heads.layer_00": [1.0, 2.5],
}  # fmt: skip


def test_files_of_the_first_version_are_read_and_written_the_same(tmp_path):
    text = json.dumps(OLD_FACTS, indent=2) + "\n"
    (tmp_path / "scores.json").write_text(text)
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in OLD_TENSORS.items()}
    save_file(tensors, tmp_path / "scores.safetensors")
    data = (tmp_path / "scores.safetensors").read_bytes()
    read_scores(tmp_path).write(tmp_path)
    assert (tmp_path / "scores.json").read_text() == text
    assert (tmp_path / "scores.safetensors").read_bytes() == data


def _truncate(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _change_fact(folder, name, value):
    path = folder / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def _change_tensors(folder, change):
    path = folder / "scores.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


DAMAGE = {
    "no facts": (lambda folder: (folder / "scores.json").unlink(), "scores.json"),
    "no tensors": (lambda folder: (folder / "scores.safetensors").unlink(), "scores.safetensors"),
    "half facts": (lambda folder: _truncate(folder, "scores.json"), "scores.json"),
    "half tensors": (lambda folder: _truncate(folder, "scores.safetensors"), "scores.safetensors"),
    "binary facts": (lambda folder: (folder / "scores.json").write_bytes(b"\xff\xfe"), "scores.json"),
    "deep facts": (lambda folder: (folder / "scores.json").write_text("[" * 100_000), "scores.json"),
    "a list": (lambda folder: (folder / "scores.json").write_text("[]"), "scores.json"),
    "version": (lambda folder: _change_fact(folder, "schema_version", 2), "schema version 1"),
    "fact's type": (lambda folder: _change_fact(folder, "num_samples", "16"), "num_samples='16'"),
    "arch": (lambda folder: _change_fact(folder, "arch", {"num_layers": 3}), "is missing"),
    "missing tensor": (lambda folder: _change_tensors(folder, lambda t: t.pop("hidden_size")), "'hidden_size'"),
    "missing layer": (
        lambda folder: _change_tensors(folder, lambda t: t.pop("ffn_hidden_size.layer_02")),
        "'ffn_hidden_size.layer_02' is missing",
    ),
    "unknown tensor": (
        lambda folder: _change_tensors(folder, lambda t: t.update(kv_channels=torch.ones(2))),
        "tensor 'kv_channels' is of no axis",
    ),
    "a layer too many": (
        lambda folder: _change_tensors(folder, lambda t: t.update({"ffn_hidden_size.layer_03": torch.ones(10)})),
        "tensor 'ffn_hidden_size.layer_03' is of no axis",
    ),
    "axes not a list": (lambda folder: _change_fact(folder, "axes", "hidden_size"), "axes='hidden_size'"),
    "criteria not a mapping": (lambda folder: _change_fact(folder, "criteria", ["taylor"]), "criteria=['taylor']"),
    "unknown axis": (lambda folder: _change_fact(folder, "axes", ["kv_channels"]), "allowed are num_layers"),
    "uneven layers": (
        lambda folder: _change_tensors(folder, lambda t: t.update({"ffn_hidden_size.layer_02": torch.ones(9)})),
        "layers of ffn_hidden_size differ in shape",
    ),
    "other size": (lambda folder: _change_tensors(folder, lambda t: t.update(num_layers=torch.ones(4))), "num_layers"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_on_one_line_that_names_it(tmp_path, kind):
    random_scores(ARCH).write(tmp_path)
    damage, message = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(UserError) as refused:
        read_scores(tmp_path)
    assert message in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
