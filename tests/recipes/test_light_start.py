"""What needs no tensor imports neither torch nor Megatron: help, questions of launchers, dry runs, refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from asked_in_one_process import HEAVY

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
LLAMA = ("--config-name", "llama31_width")

# recipe, arguments, exit code, words that the answer must hold
LIGHT = [
    *((name, ("--help",), 0, "usage: ") for name in RECIPES),
    *((name, ("--processes",), 0, "") for name in RECIPES),
    *((name, (*LLAMA, "dry_run=true"), 0, "dry run")
      for name in ("distill", "evaluate", "prune", "pipeline", "score_blocks")),
    ("score_blocks", (*LLAMA, "score_blocks.measures=[]"), 2, "there is nothing to score"),
    ("score_blocks", ("--config-name", "llama31_depth", "dry_run=true"), 0,
     "49 blocks of 1, 16 of 32 layers: 664 layers a micro-batch, 20.8 whole passes"),
    ("prune", (*LLAMA, "dry_run=true", "prune.target.drop_by=task"), 2, "needs num_layers"),
    ("pipeline", (*LLAMA, "--jobs"), 0, "distill"),
    ("distill", ("--shell-completion", "query=bash"), 0, "trainer.devices="),
    ("distill", (*LLAMA, "--cfg", "job"), 0, "hidden_size: 4096"),
    ("distill", (), 2, "--config-name is missing"),
    ("distill", ("--config-name", "nowhere"), 2, "no such config"),
    ("distill", (*LLAMA, "surprise=1"), 2, "surprise: unknown key"),
    ("distill", (*LLAMA, "seed=-1"), 2, "seed=-1: must be"),
    ("distill", (*LLAMA, "seed=many"), 2, "seed"),
    ("distill", (*LLAMA, "distill.training.global_batch_size=3"), 2, "global_batch_size=3"),
    ("distill", (*LLAMA, "trainer.devices=3"), 2, "trainer.devices=3"),
    # an input that is not there, for every recipe that takes a model
    *((name, (*LLAMA, "run_dir=/nowhere"), 2, "is not a .nemo model folder: no such folder")
      for name in ("correct_teacher", "distill", "estimate_importance", "evaluate", "export_hf", "prune",
                    "score_blocks")),
    ("random_init", (*LLAMA, "random_init.like=/nowhere"), 2, "is not a .nemo model folder"),
    ("report", LLAMA, 2, "report.models is empty"),
    ("import_hf", (*LLAMA, "import_hf.source=null"), 2, "import_hf.source is not set"),
    ("prepare_data", (*LLAMA, "prepare_data.corpora.text.input=/nowhere"), 2, "no such file or folder"),
]  # fmt: skip


ENVIRONMENT = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "COMP_POINT": "44",
               "COMP_LINE": "distill.py --config-name llama31_width trainer.d"}  # fmt: skip


@pytest.fixture(scope="module")
def answers():
    """(recipe, arguments) -> answer, all given by one process: the next imports nothing that the one before did."""
    questions = [(str(ROOT / "recipes" / f"{name}.py"), arguments) for name, arguments, *_ in LIGHT]
    command = [sys.executable, str(ROOT / "tests" / "asked_in_one_process.py")]
    done = subprocess.run(command, input=json.dumps(questions), capture_output=True, text=True, timeout=120, cwd=ROOT,
                          env=ENVIRONMENT)  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ours"], "or nothing would be seen"
    return {(name, arguments): answer for (name, arguments, *_), answer in zip(LIGHT, told["answers"], strict=True)}


@pytest.mark.parametrize(
    ("name", "arguments", "code", "says"), LIGHT, ids=lambda value: " ".join(value) if isinstance(value, tuple) else ""
)
def test_what_needs_no_tensor_imports_no_torch(name, arguments, code, says, answers):
    ended, out, err, heavy = answers[name, arguments]
    assert ended == code, err
    assert says in out + err
    assert len(err.splitlines()) == 1 or code == 0, err
    assert not heavy


def imported(lines: list[str]) -> set[str]:
    """Top-level packages in what `-X importtime` printed."""
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines if line.startswith("import time:")}


@pytest.mark.parametrize(("name", "arguments", "code", "says"), [LIGHT[0], *LIGHT[-1:]], ids=["help", "refusal"])
def test_a_script_started_alone_does_the_same(name, arguments, code, says):
    """What Python itself says it imported, from its start to its end."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "recipes" / f"{name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=ENVIRONMENT)
    lines = done.stderr.splitlines()
    told = [line for line in lines if not line.startswith("import time:")]
    assert done.returncode == code, told
    assert says in done.stdout + "\n".join(told)
    assert not imported(lines) & HEAVY
    assert "minitron_nemo" in imported(lines)  # or nothing would be seen


def test_the_first_missing_input_is_told_before_another_is_hashed(tmp_path, monkeypatch):
    """Hashing a student of gigabytes takes minutes: not before the teacher is known to be there."""
    from minitron_nemo.artefacts.origin import Origin
    from minitron_nemo.artefacts.publishing import publishing
    from minitron_nemo.config.compose import compose
    from minitron_nemo.errors import UserError
    from minitron_nemo.steps.execute import execute
    from recipes import distill

    monkeypatch.setattr(distill, "open_verified", lambda path: pytest.fail(f"{path} was opened"))
    with publishing(tmp_path / "there.nemo", kind="model", origin=Origin("f")) as draft:
        (draft.folder / "model_config.yaml").touch()
    overrides = [f"distill.checkpoint={tmp_path}/there.nemo", f"distill.teacher={tmp_path}/absent.nemo"]
    with pytest.raises(UserError, match="absent.nemo is not a .nemo model folder: no such folder"):
        execute(distill.RECIPE, compose("llama31_width", overrides))
