"""Scores of several jobs joined, finished anew and compared, as a user would; the jobs' sums are made by hand."""

import json
from pathlib import Path

import pytest
import torch
from fake_megatron import ARCH, FakeModel, random_tapes, select_samples
from tiny_run import write_tiny_run

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.cli import run_command
from minitron_nemo.errors import UserError
from minitron_nemo.importance.calibration_text import read_text
from minitron_nemo.importance.hooks import listening
from minitron_nemo.importance.scores import read_scores
from minitron_nemo.importance.second_moments import SecondMomentFile, shapes
from minitron_nemo.importance.sums import Heard, ImportanceSums, read_sums, stretches
from minitron_nemo.steps.score_folders import Estimated
from recipes.compare_importance import RECIPE as COMPARE
from recipes.merge_importance import RECIPE as MERGE

SET = 16


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(words of the command line, a folder with the scores of one job over all and of two over a half each)"""
    folder = tmp_path_factory.mktemp("place")
    config_dir, _ = write_tiny_run(folder)
    tapes = random_tapes(ARCH, seq=3, batch=SET, seed=1)
    for name, samples in (("all", range(SET)), ("first", range(8)), ("last", range(8, SET))):
        model = FakeModel([1, 2, 3, 4])
        with listening(model, arch=ARCH) as statistics:
            sums = ImportanceSums(ARCH, statistics.criteria, "mean", Heard("d", SET, 3))
            for stretch in stretches(samples, set_samples=SET, at_most=4):
                model(select_samples(tapes, slice(stretch.start, stretch.stop)))
                sums = sums.add(statistics.take(stretch))
        text = torch.arange(2 * 80).reshape(2, 80) % ARCH.vocab_size if name != "last" else torch.ones(2, 80).long()
        publish(folder / name, Estimated(sums, "l2", text, moments_of(samples)))
    return ["--config-name", "tiny", "--config-dir", str(config_dir)], folder


def moments_of(samples):
    """Second moments that add up over samples, as whole numbers that float32 holds."""

    def tensors(dtype):
        for name, shape in shapes(ARCH).items():
            each = torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(shape) + 1
            yield name, each * len(samples)

    return tensors


def publish(folder: Path, found: Estimated) -> None:
    extra = {"arch": ARCH.to_dict()}
    with publishing(folder, kind="importance", origin=Origin(folder.name), extra=extra) as draft:
        found.write(draft.folder)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}


def test_two_jobs_make_the_files_of_one(place):
    words, folder = place
    overrides = [f"merge_importance.inputs=[{folder}/last,{folder}/first]", f"merge_importance.output={folder}/both"]
    assert run_command(MERGE, [*words, *overrides]) == 0
    assert files(folder / "both") == files(folder / "all")
    before = (folder / "both" / "manifest.json").read_bytes()
    assert run_command(MERGE, [*words, *overrides]) == 0
    assert (folder / "both" / "manifest.json").read_bytes() == before, "what is done is not made again"


def test_second_moments_add_up_and_need_all_inputs_to_have_them(place, capsys):
    words, folder = place
    both, half = (SecondMomentFile(folder / name, ARCH) for name in ("all", "first"))
    assert both.tokens == 2 * half.tokens
    ours, theirs = both.sums("linear_fc2", 3), half.sums("linear_fc2", 3)
    assert all(torch.equal(whole, 2 * part) for whole, part in zip(ours, theirs, strict=True))
    publish(folder / "without", Estimated(read_sums(folder / "last"), "l2"))
    inputs = f"merge_importance.inputs=[{folder}/first,{folder}/without]"
    assert run_command(MERGE, [*words, inputs, f"merge_importance.output={folder}/never"]) == 2
    assert "without has no second moments, " + str(folder / "first") + " has: estimate both" in capsys.readouterr().err
    assert not (folder / "never").exists()


def test_the_calibration_text_of_the_earliest_samples_is_kept(place, tmp_path):
    _, folder = place
    text = read_text(folder / "all", vocab_size=ARCH.vocab_size)
    assert torch.equal(text, (torch.arange(2 * 80).reshape(2, 80) % ARCH.vocab_size)[:, :64])
    assert read_text(tmp_path, vocab_size=5) is None
    with pytest.raises(UserError, match=r"holds ids that the model does not have, 0\.\.4; score this model"):
        read_text(folder / "all", vocab_size=5)
    (tmp_path / "calibration_text.safetensors").write_bytes(b"garbage")
    with pytest.raises(UserError, match="cannot be read .*score again"):
        read_text(tmp_path, vocab_size=5)


def test_samples_that_would_count_twice_are_refused_and_nothing_is_written(place, capsys):
    words, folder = place
    inputs = f"merge_importance.inputs=[{folder}/all,{folder}/first]"
    assert run_command(MERGE, [*words, inputs, f"merge_importance.output={folder}/twice"]) == 2
    assert "first: samples 0..1 of the calibration set are in" in capsys.readouterr().err
    assert not (folder / "twice").exists()


def test_one_folder_is_finished_anew_by_another_aggregation(place):
    words, folder = place
    overrides = ["merge_importance.batch_aggregation=variance", f"merge_importance.output={folder}/anew"]
    assert run_command(MERGE, [*words, f"merge_importance.inputs=[{folder}/all]", *overrides]) == 0
    anew = read_scores(folder / "anew")
    assert anew.batch_aggregation == "variance"
    expected = read_sums(folder / "all").finish("variance")
    assert all(torch.equal(anew[axis], scores) for axis, scores in expected.items())
    with_other = [f"merge_importance.inputs=[{folder}/anew]", f"merge_importance.output={folder}/again"]
    assert run_command(MERGE, [*words, *with_other]) == 0
    assert read_scores(folder / "again").batch_aggregation == "variance"


def test_scores_are_compared_at_the_target_of_pruning(place, capsys):
    words, folder = place
    target = ["prune.target.hidden_size=6", "prune.target.ffn_hidden_size=4"]
    for name, inputs, rows in (("pair", "first,{}/last", 2), ("samples", "all", 12)):
        overrides = [f"compare_importance.inputs=[{folder}/{inputs.format(folder)}]",
                     f"compare_importance.output={folder}/{name}.json"]  # fmt: skip
        assert run_command(COMPARE, [*words, *target, *overrides]) == 0
        assert len(json.loads((folder / f"{name}.json").read_text())["overlaps"]) == rows
        assert (folder / f"{name}_ffn_hidden_size.svg").is_file()
    assert "8 samples / 16 samples" in capsys.readouterr().out
