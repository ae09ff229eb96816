"""pytest tests/unit/test_training_checkpoints.py: which training checkpoints belong to a run."""

import json

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.testing import LLAMA
from minitron_nemo.training.checkpoints import KIND, CheckpointFolder
from minitron_nemo.training.metrics import MetricsWriter


def publish(folder, step, fingerprint):
    with publishing(folder / f"step_{step:08d}", kind=KIND, origin=Origin(fingerprint)) as draft:
        (draft.folder / "state").write_text(fingerprint)


def test_only_checkpoints_of_the_same_configuration_are_resumed_or_removed(tmp_path, caplog):
    """A long run of other settings must not push the first checkpoints of a new run out."""
    for step, fingerprint in ((100, "new"), (1000, "old"), (2000, "old"), (200, "new")):
        publish(tmp_path, step, fingerprint)
    (tmp_path / "step_00000300.tmp-abcd").mkdir()  # what a kill leaves
    checkpoints = CheckpointFolder(tmp_path, "new", LLAMA, groups=None, layout="alone")
    assert [folder.name for folder in checkpoints.steps()] == ["step_00000100", "step_00000200"]
    assert checkpoints._newest() == str(tmp_path / "step_00000200")
    assert "step_00001000, step_00002000 of another configuration" in caplog.text


def test_a_run_from_the_start_drops_the_metrics_of_the_run_before_and_a_resumed_one_keeps_them(tmp_path):
    for resumed_step, steps in ((0, [10, 20, 30]), (20, [30]), (0, [10])):
        metrics = MetricsWriter(tmp_path, resumed_step=resumed_step)
        for step in steps:
            metrics.write(step=step, loss=1.0)
        metrics.close()
        records = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert records == ([10, 20, 30] if resumed_step or len(steps) == 3 else [10])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
