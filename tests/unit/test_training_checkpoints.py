"""pytest tests/unit/test_training_checkpoints.py: which training checkpoints belong to a run."""

import dataclasses
import json

import pytest

from minitron_nemo.artefacts import publishing as publishing_module
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.errors import UserError
from minitron_nemo.testing import LLAMA
from minitron_nemo.training.checkpoints import KIND, CheckpointFolder
from minitron_nemo.training.metrics import MetricsWriter


def publish(folder, step, fingerprint, *, parents=None, **extra):
    origin = Origin(fingerprint, parents=parents or {})
    with publishing(folder / f"step_{step:08d}", kind=KIND, origin=origin, extra=extra) as draft:
        (draft.folder / "state").write_text(fingerprint)


def test_only_checkpoints_of_the_same_configuration_are_resumed_or_removed(tmp_path, caplog):
    """A long run of other settings must not push the first checkpoints of a new run out."""
    for step, fingerprint in ((100, "new"), (1000, "old"), (2000, "old"), (200, "new")):
        publish(tmp_path, step, fingerprint)
    (tmp_path / "step_00000300.tmp-abcd").mkdir()  # what a kill leaves
    checkpoints = CheckpointFolder(tmp_path, "new", LLAMA, groups=Groups(), layout="alone")
    assert [folder.name for folder in checkpoints.steps()] == ["step_00000100", "step_00000200"]
    assert checkpoints._newest() == tmp_path / "step_00000200"
    assert "step_00001000, step_00002000 of another configuration" in caplog.text


def test_damage_that_another_rank_finds_counts(tmp_path, caplog):
    """Each rank reads a share of the files; all must take the same checkpoint."""

    class Groups2(Groups):
        def share_json(self, value):
            """What two ranks share when the other finds damage in the newest alone."""
            newest = isinstance(value, list) or "step_00000200" in asked[-1]
            return [value] if isinstance(value, list) else [value, "optimizer_00001: damaged" if newest else None]

    asked = []

    class Watched(CheckpointFolder):
        def _damage(self, folder):
            asked.append(str(folder))
            return super()._damage(folder)

    for step in (100, 200):
        publish(tmp_path, step, "f")
    checkpoints = Watched(tmp_path, "f", LLAMA, groups=Groups2(), layout="alone")
    assert checkpoints._newest() == tmp_path / "step_00000100"
    assert "optimizer_00001: damaged; trying an older checkpoint" in caplog.text


def test_a_run_that_minimizes_something_else_is_not_begun_anew_unasked(tmp_path):
    minimized = "1 x forward_kl at temperature 1 + 0 x cross_entropy"
    publish(tmp_path, 4, "old", objective=minimized)
    options = dict(groups=Groups(), layout="alone")
    other = CheckpointFolder(tmp_path, "new", LLAMA, objective="1 x reverse_kl at temperature 1", **options)
    with pytest.raises(UserError, match="step_00000004 minimized 1 x forward_kl.*, this is 1 x reverse_kl"):
        other.resume(None)
    dataclasses.replace(other, overwrite=True).resume(None)
    dataclasses.replace(other, objective=minimized).resume(None)  # other data, say: as before


def test_a_run_with_another_teacher_is_not_begun_anew_unasked(tmp_path):
    """A changed teacher, or another one, makes another fingerprint; the run would begin at the first step."""
    publish(tmp_path, 4, "old", parents={"student": "a" * 64, "teacher": "b" * 64})
    run = CheckpointFolder(tmp_path, "new", LLAMA, groups=Groups(), layout="alone",
                           parents={"student": "a" * 64, "teacher": "c" * 64})  # fmt: skip
    with pytest.raises(UserError, match=r"step_00000004 learned from another teacher \(b{12}\), this is c{12}: go on"):
        run.resume(None)
    with pytest.raises(UserError, match=r"another teacher \(b{12}\), this is none"):
        dataclasses.replace(run, parents={}).resume(None)
    dataclasses.replace(run, overwrite=True).resume(None)
    dataclasses.replace(run, parents={"student": "d" * 64, "teacher": "b" * 64}).resume(None)  # as before
    publish(tmp_path, 5, "of a time that wrote no parents down")
    run.resume(None)


def test_two_runs_do_not_share_a_folder(tmp_path):
    checkpoints = CheckpointFolder(tmp_path / "checkpoints" / "student", "f", LLAMA, groups=Groups(), layout="alone")
    with checkpoints.locked(), pytest.raises(UserError, match="student: another run is writing it"):
        checkpoints.locked().__enter__()
    with checkpoints.locked():
        pass
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(("saves_left", "there", "times"), [(0, 0, 0), (1, 0, 1), (9, 0, 3), (9, 1, 2), (9, 2, 1)])
def test_room_for_all_checkpoints_that_lie_there_at_once_is_asked_for_before_the_first_step(
    saves_left, there, times, tmp_path, monkeypatch
):
    """Two are kept and the third is whole before the first goes; of each parameter 4 bytes and 12 of the optimizer."""
    for step in range(there):
        publish(tmp_path, step, "f")
    checkpoints = CheckpointFolder(tmp_path, "f", LLAMA, groups=Groups(), layout="alone")
    needed = times * 16 * LLAMA.num_params()
    monkeypatch.setattr(publishing_module, "free_bytes", lambda path: 1.1 * needed)
    checkpoints.check_space(saves_left)
    if needed:
        monkeypatch.setattr(publishing_module, "free_bytes", lambda path: 1.09 * needed)
        with pytest.raises(UserError, match=r"needs [\d.]+ MB, [\d.]+ MB are free"):
            checkpoints.check_space(saves_left)


def test_a_run_from_the_start_drops_the_metrics_of_the_run_before_and_a_resumed_one_keeps_them(tmp_path):
    for resumed_step, steps in ((0, [10, 20, 30]), (20, [30]), (0, [10])):
        metrics = MetricsWriter(tmp_path, resumed_step=resumed_step)
        for step in steps:
            metrics.write(step=step, loss=1.0)
        metrics.close()
        records = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert records == ([10, 20, 30] if resumed_step or len(steps) == 3 else [10])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
