"""The whole chain: killed half-way, run again to its end, run once more with nothing left to do."""

import contextlib
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from layouts import logits_of
from safetensors.torch import load_file
from tiny_run import MODELS, NUM_STEPS, ROOT, tree, write_tiny_run

from minitron_nemo.artefacts.manifest import read_manifest, verify_files
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.importance.scores import read_scores
from minitron_nemo.importance.sums import read_sums
from minitron_nemo.pruning.plan import read_plan
from minitron_nemo.shape.axes import shrink
from minitron_nemo.testing import ALONE, run_layout
from minitron_nemo.training.checkpoints import BESIDE
from recipes.pipeline import main as run_pipeline

CHECKPOINT = "checkpoints/pretrained/step_00000002"
PATIENCE = 120  # seconds; the chain up to its first training checkpoint takes ten


def command_line(config_dir: Path) -> list[str]:
    return ["--config-name", "tiny", "--config-dir", str(config_dir)]


def kill_when(there: str, *, run_dir: Path, config_dir: Path) -> None:
    """Start the pipeline as a user would and kill it, and not its ranks, as soon as a file matches `there`."""
    command = [sys.executable, "recipes/pipeline.py", *command_line(config_dir)]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    try:
        while not list(run_dir.glob(there)):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, f"no {there} after {PATIENCE} s"
            time.sleep(0.02)
        process.kill()
        process.communicate(timeout=10)  # the ranks hold the other end of the pipe until they end too
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """(run folder, config folder) of a chain that was killed during its first training and then run to its end."""
    config_dir, run_dir = write_tiny_run(tmp_path_factory.mktemp("chain"))
    kill_when(f"{CHECKPOINT}/manifest.json", run_dir=run_dir, config_dir=config_dir)
    assert not (run_dir / "pretrained.nemo").exists()
    finished = ("tokenizer/", "data/", "random_init.nemo/", CHECKPOINT)
    before = {name: value for name, value in tree(run_dir).items() if name.startswith(finished)}
    assert run_pipeline(command_line(config_dir)) == 0
    after = tree(run_dir)
    again = [name for name, value in before.items() if after[name] != value]
    assert before
    assert not again, "what was finished is not made again, nor are training steps before a checkpoint"
    return run_dir, config_dir


def test_the_report_has_every_model_with_its_numbers(chain):
    run_dir, _ = chain
    models = json.loads((run_dir / "report.json").read_text())["models"]
    assert tuple(models) == MODELS
    for name, model in models.items():
        assert model["params"] == open_nemo(run_dir / f"{name}.nemo").arch.num_params()
        assert model["perplexity"] == pytest.approx(math.exp(model["cross_entropy"]))
        assert 0 <= model["top1_agreement"] <= 1
        assert model["forward_kl"] > -1e-6
    assert models["corrected_teacher"]["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert models["corrected_teacher"]["top1_agreement"] == 1
    per_run = 4 * 4 * 32  # steps x samples x tokens
    tokens = {name: models[name]["tokens"] / per_run for name in MODELS}
    own = {"teacher": 0, "corrected_teacher": 1, "width_pruned": 0, "width_student": 1, "depth_student": 1}
    assert tokens == own, "the tokens of the step that made a model, not those of its ancestors"
    page = (run_dir / "report.html").read_text()
    assert all(name in page for name in MODELS)


def test_training_went_on_after_the_kill_without_a_gap(chain):
    run_dir, _ = chain
    records = [
        json.loads(line) for line in (run_dir / "logs" / "pretrained" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [record["step"] for record in records if "cross_entropy" in record] == [1, 2, 3, 4]
    assert [record["consumed_tokens"] for record in records if "cross_entropy" in record] == [128, 256, 384, 512]


def test_every_rank_has_a_log_in_the_run_folder(chain):
    run_dir, _ = chain
    for model in ("pretrained", "corrected_teacher", "importance", "width_student", "depth_student"):
        main, other = (run_dir / "logs" / model / f"rank_{rank:05d}.log" for rank in (0, 1))
        assert main.stat().st_size > 0
        assert other.is_file()
    log = (run_dir / "logs" / "pretrained" / "rank_00001.log").read_text()
    assert "resumed from" in log, "what only rank 0 says on standard error, every rank says in its log"
    width, depth = (
        (run_dir / "logs" / f"{name}_student" / "rank_00000.log").read_text() for name in ("width", "depth")
    )
    assert "torch AdamW" in width
    for log in (width, depth):
        assert "teacher: layers in host memory" in log


def test_shapes_are_those_asked_for(chain):
    run_dir, _ = chain
    teacher, width, depth = (
        open_nemo(run_dir / f"{name}.nemo").arch for name in ("teacher", "width_student", "depth_student")
    )
    assert width == shrink(teacher, hidden_size=24, ffn_hidden_size=48)
    assert depth == shrink(teacher, num_layers=2)


def test_students_learn_the_hidden_states_of_the_layers_that_they_were(chain):
    """And what was trained for that beside them is in training checkpoints alone."""
    run_dir, _ = chain
    maps = {
        "width_student": {"weight", "map.weight", "map.exp_avg", "map.exp_avg_sq", "map.step"},
        "depth_student": {"weight"},
    }
    for student, beside in maps.items():
        checkpoint = run_dir / "checkpoints" / student / "step_00000002"
        assert set(load_file(checkpoint / BESIDE)) == beside
        plan = read_plan(run_dir / student.replace("student", "pruned.nemo") / "plan.json")
        pairs = ", ".join(f"{theirs + 1}:{ours + 1}" for ours, theirs in enumerate(plan.layers))
        objective = read_manifest(checkpoint, kind=None).extra["objective"]
        assert objective.endswith(f"automatic weight x layer_outputs_cosine (teacher:student {pairs})")
        log = (run_dir / "logs" / student / "metrics.jsonl").read_text().splitlines()
        weights = [record["hidden_states_weight"] for record in map(json.loads, log) if "loss" in record]
        assert weights[0] == 0 < min(weights[1:])
    assert not [key for key in load_file(run_dir / "width_student_hf" / "model.safetensors") if "map" in key]


def test_importance_says_what_it_was_heard_on_and_keeps_nothing_beside_it(chain):
    run_dir, _ = chain
    sums, scores = read_sums(run_dir / "importance"), read_scores(run_dir / "importance")
    model = open_nemo(run_dir / "packed.nemo")
    assert (sums.heard.model, sums.heard.tokenizer) == (model.sha256, load_tokenizer(model.tokenizer).fingerprint)
    assert (sums.heard.data, sums.num_samples, sums.heard.precision) == (scores.data_fingerprint, 4, "fp32")
    assert all(torch.equal(scores[axis], anew) for axis, anew in sums.finish("l2").items())
    assert not list(run_dir.glob("checkpoints/importance/*/samples_*"))


def test_every_artefact_is_whole_and_names_its_parents(chain):
    run_dir, _ = chain
    manifests = {path.parent.name: read_manifest(path.parent, kind=None) for path in run_dir.glob("*/manifest.json")}
    for name, manifest in manifests.items():
        verify_files(run_dir / name, manifest)
    student = manifests["width_student.nemo"]
    assert student.parents == {
        "student": open_nemo(run_dir / "width_pruned.nemo").sha256,
        "teacher": open_nemo(run_dir / "packed.nemo").sha256,
    }
    assert not list(run_dir.glob("*.tmp-*")), "leftovers of the kill"


def test_exports_open_with_transformers_and_say_the_same(chain):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, _ = chain
    text = "a smaller one learns what remains of it again and the model forgets"
    tokens = AutoTokenizer.from_pretrained(run_dir / "teacher_hf")(text, return_tensors="pt").input_ids
    assert tokens.shape[1] > 10
    ours = run_layout(logits_of, ALONE, [run_dir / f"{name}.nemo" for name in MODELS], tokens)
    for name, logits in zip(MODELS, ours, strict=True):
        with torch.no_grad():
            theirs = (
                AutoModelForCausalLM.from_pretrained(run_dir / f"{name}_hf", dtype=torch.float32).eval()(tokens).logits
            )
        torch.testing.assert_close(torch.from_numpy(logits), theirs, rtol=0, atol=1e-5)


def test_a_second_run_does_nothing(chain, caplog):
    run_dir, config_dir = chain
    before = tree(run_dir)
    caplog.set_level(logging.INFO, logger="minitron_nemo")
    assert run_pipeline(command_line(config_dir)) == 0
    skipped = [record for record in caplog.records if "is done, nothing to do" in record.getMessage()]
    assert len(skipped) == NUM_STEPS - 1, "every step but the report, which shows the present"
    after = tree(run_dir)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == ["report.html", "report.json"]


def test_a_changed_setting_is_refused_rather_than_mixed_in(chain, capsys):
    run_dir, config_dir = chain
    before = tree(run_dir)
    assert run_pipeline([*command_line(config_dir), "correct_teacher.training.optim.lr=1e-3"]) == 2
    assert "made by another configuration; set overwrite=true or move it" in capsys.readouterr().err
    assert tree(run_dir) == before
