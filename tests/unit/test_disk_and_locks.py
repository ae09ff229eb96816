"""One writer for each output, and a disk that refuses is one line that names the file, the need and the room."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minitron_nemo.artefacts import disk
from minitron_nemo.artefacts.atomic import write_text_atomically
from minitron_nemo.artefacts.lock import Lock, locked
from minitron_nemo.artefacts.manifest import file_sha256
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import begin, check_free_space, publishing
from minitron_nemo.checkpoint.torch_dist import TorchDistWriter
from minitron_nemo.data.verified import verify_once
from minitron_nemo.errors import UserError
from minitron_nemo.steps.execute import execute
from minitron_nemo.steps.step import Job, Recipe
from minitron_nemo.testing import LLAMA, random_nemo
from minitron_nemo.training.metrics import MetricsWriter
from minitron_nemo.training.optimizer_state import write_optimizer

ROOT = Path(__file__).resolve().parents[2]
ORIGIN = Origin("f")
ROOM = r"(needs about [\d.e+]+ \w+, )?[\d.]+ [kMGT]B are free on that disk: make room"


@contextmanager
def small_disk():
    """No file may grow beyond 8 KiB: what a full disk does, without filling one.

    Around the writes alone: pytest's own output may be a file beyond 8 KiB.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def optimizer_of(size):
    """As much of a training state as is written."""
    parameter = torch.zeros(size)
    inner = SimpleNamespace(param_groups=[{"params": [parameter]}], state={parameter: {"exp_avg": torch.zeros(size)}})
    schedule = SimpleNamespace(state_dict=dict)
    return SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner), schedule=schedule)


def write_weights(folder):
    TorchDistWriter(folder).write("w", torch.zeros(9000), global_shape=(9000,), offset=(0,))


WRITERS = {
    "bytes": lambda folder: (folder / "x").write_bytes(bytes(9000)),
    "weights": write_weights,
    "optimizer state": lambda folder: write_optimizer(folder / "o.safetensors", optimizer_of(9000)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_nothing(writer, tmp_path):
    target = tmp_path / "model.nemo"
    with (
        small_disk(),
        pytest.raises(UserError, match=f"^{target}: cannot be written: .*; {ROOM}") as refusal,
        publishing(target, kind="model", origin=ORIGIN) as draft,
    ):
        WRITERS[writer](draft.folder)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_known_to_be_needed_is_asked_for_before_and_said_when_it_was_not_there(tmp_path):
    with (
        small_disk(),
        pytest.raises(UserError, match=r"x: needs 1\.1e\+06 TB, "),
        publishing(tmp_path / "x", kind="model", origin=ORIGIN, needed=10**18),
    ):
        pass
    with (
        small_disk(),
        pytest.raises(UserError, match=r"x: cannot be written: File too large; needs about 9 kB, "),
        publishing(tmp_path / "x", kind="model", origin=ORIGIN, needed=9000) as draft,
    ):
        WRITERS["bytes"](draft.folder)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_is_one_line_and_leaves_nothing(tmp_path):
    with small_disk(), pytest.raises(UserError, match=f"m.nemo: cannot be written: .*; {ROOM}"):
        random_nemo(tmp_path / "m.nemo", LLAMA)
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_does_not_fit_leaves_the_old_one(tmp_path):
    path = tmp_path / "eval" / "model.json"
    write_text_atomically(path, "old")
    with small_disk(), pytest.raises(UserError, match=f"{path}: cannot be written: File too large; {ROOM}"):
        write_text_atomically(path, "new" * 9000)
    assert [file.name for file in path.parent.iterdir()] == ["model.json"]
    assert path.read_text() == "old"


def test_metrics_that_do_not_fit_are_one_line(tmp_path):
    metrics = MetricsWriter(tmp_path)
    with small_disk(), pytest.raises(UserError, match=f"metrics.jsonl: cannot be written: File too large; {ROOM}"):
        metrics.write(step=1, **{f"loss_{number}": 0.0 for number in range(900)})


def test_metrics_of_a_resumed_run_are_whole_or_as_they_were(tmp_path):
    path = tmp_path / "metrics.jsonl"
    old = "".join(json.dumps({"step": step, "loss": 0.0}) + "\n" for step in range(1, 1001))
    path.write_text(old)
    with small_disk(), pytest.raises(UserError, match=f"{path}: cannot be written"):
        MetricsWriter(tmp_path, resumed_step=900)
    assert path.read_text() == old


def test_where_the_cache_of_hashes_cannot_be_written_files_are_hashed_again(tmp_path):
    files = [tmp_path / f"{number:080d}" for number in range(100)]
    for file in files:
        file.write_bytes(b"x")
    with small_disk():
        verify_once({file: file_sha256(file) for file in files}, cache=tmp_path / "cache", remedy="")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", [(Path, "mkdir"), (os, "open")])
def test_a_disk_that_takes_nothing_is_one_line(call, code, tmp_path, monkeypatch):
    target = tmp_path / "run" / "model.nemo"

    def refuse(path, *args, **kwargs):
        raise OSError(code, os.strerror(code), str(path))

    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(*call, refuse)
        with pytest.raises(UserError) as refusal:
            begin(target, kind="model", origin=ORIGIN)
    line = str(refusal.value)
    assert re.fullmatch(rf"{target}: cannot be written: {os.strerror(code)}; {ROOM}.*", line), line
    assert list((tmp_path / "run").iterdir()) == []


def test_an_input_that_may_not_be_read_is_named_itself(tmp_path):
    source = tmp_path / "elsewhere" / "weights.bin"
    with (
        pytest.raises(UserError, match=f"^{source}: Permission denied; needed to write"),
        disk.writing(tmp_path / "a/b"),
    ):
        raise PermissionError(errno.EACCES, "Permission denied", str(source))


@pytest.mark.parametrize("error", [ValueError("no"), FileNotFoundError(errno.ENOENT, "no"), RuntimeError("CUDA error")])
def test_what_is_not_of_the_disk_stays_what_it_is(error, tmp_path):
    with pytest.raises(type(error)), disk.writing(tmp_path / "x"):
        raise error


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (1310, "1.31 kB"), (999_600, "1 MB"), (16.06e9, "16.1 GB"),
     (3.2e15, "3200 TB")],
)  # fmt: skip
def test_sizes_have_the_unit_that_shows_them(size, words):
    assert disk.in_bytes(size) == words


def test_a_small_need_on_a_full_disk_is_shown_in_its_own_unit(tmp_path, monkeypatch):
    monkeypatch.setattr("minitron_nemo.artefacts.publishing.free_bytes", lambda path: 512)
    with pytest.raises(UserError, match=r"needs 22 kB, 512 bytes are free"):
        check_free_space(tmp_path, 20_000)


def test_of_two_writers_the_second_is_refused_by_name_and_the_first_goes_on(tmp_path):
    target = tmp_path / "model.nemo"
    with publishing(target, kind="model", origin=ORIGIN) as draft:
        (draft.folder / "x").write_text("first")
        with pytest.raises(UserError, match=rf"^{target}: another run is writing it \(process {os.getpid()} on "):
            begin(target, kind="model", origin=ORIGIN)
        assert (draft.folder / "x").read_text() == "first", "the draft of a run that lives is left alone"
    assert [path.name for path in tmp_path.iterdir()] == ["model.nemo"]
    assert (target / "x").read_text() == "first"


def test_of_two_runs_of_a_step_with_the_same_output_the_second_is_refused_before_it_works(tmp_path):
    """Also where the output appears at the end, as scores and evaluations do."""
    job = Job(tmp_path / "eval" / "student.json", "evaluation", {}, is_record=True)
    began = []

    def run(config, job):
        began.append(job)
        if len(began) == 1:
            execute(recipe, config)

    config = SimpleNamespace(dry_run=False, overwrite=False, verify_key=None)
    recipe = Recipe("evaluate", lambda config: job, run)
    with pytest.raises(UserError, match=r"student\.json: another run is writing it \(process \d+ on .*\)"):
        execute(recipe, config)
    assert len(began) == 1
    assert list(job.output.parent.iterdir()) == []


def test_other_outputs_are_not_locked(tmp_path):
    with locked(tmp_path / "a"), locked(tmp_path / "b"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_holder_gives_its_lock_up(tmp_path):
    """Across processes, because a lock is the kernel's."""
    script = (
        "import sys, time\nfrom minitron_nemo.artefacts.lock import Lock\n"
        "lock = Lock(sys.argv[1])\nprint('held', flush=True)\ntime.sleep(100)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "model.nemo")], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on"):
        Lock(tmp_path / "model.nemo")
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [".model.nemo.lock"]
    Lock(tmp_path / "model.nemo").release()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("minitron_nemo.artefacts.lock.fcntl.flock", refuse)
    with publishing(tmp_path / "data", kind="data", origin=ORIGIN) as draft:
        (draft.folder / "x").touch()
    assert "this file system has no locks" in caplog.text
    assert (tmp_path / "data").is_dir()
