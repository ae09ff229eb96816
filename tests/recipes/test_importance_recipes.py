"""Scores of several jobs joined, finished anew and compared, as a user would; the jobs' sums are made by hand."""

import json
from pathlib import Path

import pytest
import torch
from fake_megatron import ARCH, FakeModel, random_tapes, select_samples
from tiny_run import write_tiny_run

from minitron_nemo.cli import run_command
from minitron_nemo.importance.hooks import listening
from minitron_nemo.importance.scores import read_scores
from minitron_nemo.importance.sums import Heard, ImportanceSums, read_sums, stretches
from minitron_nemo.steps.kept_sums import publish
from minitron_nemo.steps.step import Job
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
            names = {axis: criterion.name for axis, criterion in statistics.criteria.items()}
            sums = ImportanceSums(ARCH, names, "mean", Heard("d", SET, 3))
            for stretch in stretches(samples, set_samples=SET, at_most=4):
                model(select_samples(tapes, slice(stretch.start, stretch.stop)))
                sums = sums.add(statistics.take(stretch))
        publish(sums, Job(folder / name, "importance", {"job": name}), batch_aggregation="l2")
    return ["--config-name", "tiny", "--config-dir", str(config_dir)], folder


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
