"""The scores file: what is written is read back, what is damaged is refused on one line."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_nemo.arch import ModelArch
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import AXES, ImportanceScores, read_scores

ARCH = ModelArch(num_layers=3, hidden_size=8, ffn_hidden_size=10, num_attention_heads=4, num_query_groups=2,
                 kv_channels=2, vocab_size=32, seq_length=64)  # fmt: skip


def random_scores(seed: int = 0, arch: ModelArch = ARCH) -> ImportanceScores:
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    return ImportanceScores(
        arch=arch,
        hidden_size=rand(arch.hidden_size),
        ffn_hidden_size=rand(arch.num_layers, arch.ffn_hidden_size),
        num_attention_heads=rand(arch.num_layers, arch.num_attention_heads),
        num_layers=rand(arch.num_layers),
        num_samples=16,
        seq_length=32,
        sequence_aggregation="mean",
        batch_aggregation="l2",
        data_fingerprint="abc",
    )


@pytest.mark.parametrize("seed", range(3))
def test_scores_read_back_are_the_ones_written_bit_for_bit(tmp_path, seed):
    scores = random_scores(seed)
    scores.write(tmp_path)
    back = read_scores(tmp_path)
    for field in dataclasses.fields(ImportanceScores):
        ours, theirs = getattr(scores, field.name), getattr(back, field.name)
        if field.name in AXES:
            assert theirs.dtype == torch.float64
            assert torch.equal(ours, theirs)
        else:
            assert ours == theirs


def test_tensors_are_named_by_axis_and_layer(tmp_path):
    random_scores().write(tmp_path)
    layers = [f"{axis}.layer_{i:02d}" for axis in ("ffn_hidden_size", "num_attention_heads") for i in range(3)]
    assert sorted(load_file(tmp_path / "scores.safetensors")) == sorted(["hidden_size", "num_layers", *layers])


def test_the_table_counts_layers_from_one_and_shows_their_block_importance(tmp_path):
    scores = random_scores()
    scores.write(tmp_path)
    facts = json.loads((tmp_path / "scores.json").read_text())
    assert [row["layer"] for row in facts["layers"]] == [1, 2, 3]
    assert [row["block_importance"] for row in facts["layers"]] == pytest.approx(scores.num_layers.tolist(), rel=1e-5)
    assert facts["num_samples"] == 16


@pytest.mark.parametrize("axis", AXES)
def test_scores_that_are_not_finite_or_misshapen_are_refused_by_axis(axis):
    scores = random_scores()
    broken = getattr(scores, axis).clone()
    broken.view(-1)[1] = float("nan")
    with pytest.raises(UserError, match=rf"{axis}: not all finite"):
        dataclasses.replace(scores, **{axis: broken})
    with pytest.raises(UserError, match=rf"{axis}: shape"):
        dataclasses.replace(scores, **{axis: broken[..., 1:]})


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
    "uneven layers": (
        lambda folder: _change_tensors(folder, lambda t: t.update({"ffn_hidden_size.layer_02": torch.ones(9)})),
        "layers of ffn_hidden_size differ in shape",
    ),
    "other size": (lambda folder: _change_tensors(folder, lambda t: t.update(num_layers=torch.ones(4))), "num_layers"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_on_one_line_that_names_it(tmp_path, kind):
    random_scores().write(tmp_path)
    damage, message = DAMAGE[kind]
    damage(tmp_path)
    with pytest.raises(UserError) as refused:
        read_scores(tmp_path)
    assert message in str(refused.value)
    assert str(tmp_path) in str(refused.value)
    assert "\n" not in str(refused.value)
