"""Launch scripts: every word reaches the recipe as it was typed, and wrong arguments end with one line and code 2."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.s*"), ROOT / ".ci" / "run"])
RECIPES = ("train_tokenizer", "prepare_data", "random_init", "import_hf", "correct_teacher", "estimate_importance",
           "prune", "distill", "evaluate", "export_hf", "report", "pipeline")  # fmt: skip
AWKWARD = ["data.note=two words", "a=$(touch pwned)", 'b="quoted"', "c=`id`", "d=*", "e=it's", ""]
# A command that notes its words, one per line, each in brackets, and the address it was given.
RECORDER = """#!/usr/bin/env bash
{ for word in "$0" "$@"; do printf '[%s]\\n' "$word"; done; } >>"$RECORD"
printf '%s:%s\\n' "${MASTER_ADDR:-}" "${MASTER_PORT:-}" >"$RECORD.master"
"""


@pytest.fixture
def repository(tmp_path):
    """A checkout with a space in its name, empty recipes, and commands that only take notes."""
    root = tmp_path / "my repository"
    for folder in ("recipes", "conf", ".venv/bin", "bin"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(ROOT / "launch", root / "launch")
    for recipe in RECIPES:
        (root / "recipes" / f"{recipe}.py").touch()
    for config in ("llama31_width", "nemotron4_4b"):
        shutil.copy(ROOT / "conf" / f"{config}.yaml", root / "conf")
    (root / "conf" / "steps.yaml").write_text("pipeline:\n  steps:\n    - recipe: prune\n      overrides: [seed=1]\n")
    executable(root / ".venv/bin/python", "#!/bin/sh\n")
    for command in ("srun", "docker", "enroot"):
        executable(root / "bin" / command, RECORDER)
    executable(root / "bin" / "scontrol", "#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    executable(
        root / "bin" / "sbatch",
        RECORDER + '\nn=$(grep -c "/sbatch]" "$RECORD"); printf "%s;cluster\\n" "$((100 + n))"\n',
    )
    return root


def executable(path, text):
    path.write_text(text)
    path.chmod(0o755)


def launch(root, script, *arguments, **variables):
    environment = {"PATH": f"{root}/bin:{os.environ['PATH']}", "HOME": str(root / "home"),
                   "RECORD": str(root / "record"), **variables}  # fmt: skip
    return subprocess.run(["bash", str(root / "launch" / script), *arguments], cwd=root, env=environment,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)  # fmt: skip


def words(root):
    return re.findall(r"\[(.*?)\]\n", (root / "record").read_text(), re.DOTALL)


def slurm(root, *arguments, **variables):
    job = {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS": "32",
           "SLURM_CPUS_PER_TASK": "12", "SLURM_CPUS_ON_NODE": "96", "SLURM_JOB_NODELIST": "node[7-10]"}  # fmt: skip
    return launch(root, "slurm.sbatch", *arguments, **{**job, **variables})


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses_is_strict_and_executable(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, timeout=60).stderr == b""
    assert "\nset -euo pipefail\n" in script.read_text()
    assert not re.search(r"\beval\b", script.read_text())
    assert os.access(script, os.X_OK)


def test_every_script_was_found():
    assert {path.name for path in SCRIPTS} == {"slurm.sbatch", "pipeline.sh", "docker.sh", "enroot.sh", "run"}


def test_slurm_starts_one_task_per_gpu_with_every_word_as_typed(repository):
    result = slurm(repository, "distill", "llama31_width", *AWKWARD)
    assert result.returncode == 0, result.stderr
    assert words(repository) == [
        str(repository / "bin/srun"), "--kill-on-bad-exit=1", "--label", "--cpus-per-task=12",
        str(repository / ".venv/bin/python"), "recipes/distill.py", "--config-name", "llama31_width",
        "trainer.num_nodes=4", "trainer.devices=8", *AWKWARD,
    ]  # fmt: skip
    assert not (repository / "pwned").exists()


def test_ranks_meet_at_the_first_node_on_a_port_of_their_job(repository):
    slurm(repository, "distill", "llama31_width")
    assert (repository / "record.master").read_text() == f"node7:{20000 + 123456 % 20000}\n"


def test_single_process_steps_run_as_one_task_with_the_whole_node(repository):
    slurm(repository, "prune", "llama31_width", "seed=7")
    assert words(repository)[3:] == [
        "--nodes=1", "--ntasks=1", "--cpus-per-task=96", str(repository / ".venv/bin/python"), "recipes/prune.py",
        "--config-name", "llama31_width", "seed=7",
    ]  # fmt: skip


def test_slurm_in_a_container_mounts_the_repository_at_its_own_path(repository):
    slurm(
        repository, "evaluate", "llama31_width", "x=a b", CONTAINER_IMAGE="/images/m n.sqsh", CONTAINER_MOUNTS="/d:/d"
    )
    assert words(repository)[4:] == [
        "--container-image=/images/m n.sqsh", f"--container-workdir={repository}",
        f"--container-mounts={repository}:{repository},/d:/d", "--no-container-mount-home", "env",
        f"PYTHONPATH={repository}", "python", "recipes/evaluate.py", "--config-name", "llama31_width",
        "trainer.num_nodes=4", "trainer.devices=8", "x=a b",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "arguments", "variables"),
    [
        ("slurm.sbatch", [], {}),
        ("slurm.sbatch", ["distill"], {}),
        ("slurm.sbatch", ["destill", "llama31_width"], {}),
        ("slurm.sbatch", ["../x", "llama31_width"], {}),
        ("slurm.sbatch", ["distill", "llama32_width"], {}),
        ("slurm.sbatch", ["distill", "../conf/llama31_width"], {}),
        ("slurm.sbatch", ["distill", "llama31_width"], {"SLURM_NTASKS": "7", "SLURM_JOB_NUM_NODES": "2"}),
        ("slurm.sbatch", ["distill", "llama31_width"], {"VENV": "/nowhere"}),
        ("slurm.sbatch", ["distill", "llama31_width"], {"SLURM_SUBMIT_DIR": "/"}),
        ("docker.sh", ["distill"], {}),
        ("docker.sh", ["destill", "llama31_width"], {}),
        ("docker.sh", ["distill", "llama32_width"], {}),
        ("enroot.sh", [], {}),
        ("enroot.sh", ["go"], {}),
        ("enroot.sh", ["run", "distill"], {}),
        ("enroot.sh", ["run", "distill", "llama31_width"], {"SQSH": "/nowhere.sqsh"}),
        ("pipeline.sh", [], {}),
        ("pipeline.sh", ["llama32_width"], {}),
        ("pipeline.sh", ["llama31_width"], {"NODES": "many"}),
        ("pipeline.sh", ["llama31_width"], {"STEPS": "prune destill"}),
        ("pipeline.sh", ["steps"], {}),
    ],
)
def test_wrong_arguments_end_with_one_line_and_code_2(repository, script, arguments, variables):
    result = launch(repository, script, *arguments, **variables)
    assert result.returncode == 2
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert not (repository / "record").exists()


def test_docker_passes_every_word_and_mounts_the_repository(repository):
    result = launch(
        repository, "docker.sh", "distill", "llama31_width", *AWKWARD, IMAGE="image:1", MOUNTS="/a b:/c,/d:/d"
    )
    assert result.returncode == 0, result.stderr
    got = words(repository)
    assert got[got.index("image:1") :] == [
        "image:1", "python", "recipes/distill.py", "--config-name", "llama31_width", *AWKWARD,
    ]  # fmt: skip
    assert {f"--volume={repository}:/workspace", "--volume=/a b:/c", "--volume=/d:/d", "--gpus=all"} <= set(got)


def test_docker_runs_without_gpus_when_asked(repository):
    launch(repository, "docker.sh", "prune", "llama31_width", GPUS="none", IMAGE="image:1")
    assert not [word for word in words(repository) if word.startswith("--gpus")]


def test_enroot_passes_every_word(repository):
    (repository / "minitron-nemo.sqsh").touch()
    result = launch(repository, "enroot.sh", "run", "distill", "llama31_width", *AWKWARD)
    assert result.returncode == 0, result.stderr
    assert words(repository)[1:] == [
        "start", "--rw", f"--mount={repository}:{repository}", str(repository / "minitron-nemo.sqsh"), "env",
        f"--chdir={repository}", f"PYTHONPATH={repository}", "python", "recipes/distill.py", "--config-name",
        "llama31_width", *AWKWARD,
    ]  # fmt: skip


def test_pipeline_submits_the_steps_of_the_config_each_after_the_one_before(repository):
    result = launch(repository, "pipeline.sh", "nemotron4_4b", "x=a b", NODES="16", SBATCH="--account=me --qos=high")
    assert result.returncode == 0, result.stderr
    jobs = "\n".join(words(repository)).split(str(repository / "bin/sbatch") + "\n")[1:]
    steps = ["prepare_data", "estimate_importance", "prune", "distill", "evaluate", "export_hf"]
    nodes = [1, 16, 1, 16, 16, 1]
    assert len(jobs) == len(steps)
    for index, (job, step, count) in enumerate(zip(jobs, steps, nodes, strict=True)):
        wait = [f"--dependency=afterok:{100 + index}", "--kill-on-invalid-dep=yes"] if index else []
        assert job.rstrip("\n").split("\n") == [
            "--parsable", f"--job-name=nemotron4_4b-{step}", "--account=me", "--qos=high", f"--nodes={count}", *wait,
            "launch/slurm.sbatch", step, "nemotron4_4b", "x=a b",
        ]  # fmt: skip


def test_pipeline_runs_the_whole_chain_by_default_and_a_part_when_asked(repository):
    result = launch(repository, "pipeline.sh", "llama31_width")
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "import_hf", "prepare_data", "correct_teacher", "estimate_importance", "prune", "distill", "evaluate",
        "export_hf",
    ]  # fmt: skip
    result = launch(repository, "pipeline.sh", "llama31_width", STEPS="prune distill")
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["prune", "distill"]


def test_pipeline_default_is_that_of_the_configuration():
    from minitron_nemo.config import PipelineConfig

    default = re.search(r'"\$\{chain:=(.*)\}"', (ROOT / "launch" / "pipeline.sh").read_text())
    assert default is not None
    assert default[1].split() == [step.recipe for step in PipelineConfig().steps]


def test_dockerfile_starts_from_the_public_image_and_keeps_its_torch():
    text = (ROOT / "Dockerfile").read_text()
    assert re.search(r"^FROM nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3$", text, re.MULTILINE)
    wanted = re.search(r"grep -E '\^\(([\w|-]+)\)=='", text)
    assert wanted is not None
    pins = (ROOT / "constraints.txt").read_text()
    for name in wanted[1].split("|"):
        assert re.search(rf"^{name}==", pins, re.MULTILINE), name
    assert not {"torch", "numpy", "transformer-engine"} & set(wanted[1].split("|"))
    assert "--no-deps" in text
