"""Launch scripts: every word reaches the recipe as it was typed, and wrong arguments end with one line and code 2."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.s*"), ROOT / ".ci" / "run"])
# What the recipes of the checkout below say of themselves.
PROCESSES = {"import_hf": "one", "prepare_data": "one", "prune": "one", "distill": "ranks", "evaluate": "ranks",
             "pipeline": "one"}  # fmt: skip
AWKWARD = ["data.note=two words", "a=$(touch pwned)", 'b="quoted"', "c=`id`", "d=*", "e=it's", "f={g: 1, h: $i}", ""]
# A command that notes its words, one per line, each in brackets, and the address it was given.
RECORDER = """#!/usr/bin/env bash
{ for word in "$0" "$@"; do printf '[%s]\\n' "$word"; done; } >>"$RECORD"
printf '%s:%s\\n' "${MASTER_ADDR:-}" "${MASTER_PORT:-}" >"$RECORD.master"
"""
# Answers for the recipes: a recipe's file holds its word, the jobs are the steps of the config as its YAML has them.
PYTHON = f"""#!{sys.executable}
import os, sys, yaml
with open(os.environ["RECORD"] + ".asked", "a") as file:
    file.write(repr(sys.argv[1:]) + "\\n")
recipe, rest = sys.argv[1], sys.argv[2:]
if rest == ["--processes"]:
    print(open(recipe).read())
elif recipe == "recipes/pipeline.py" and rest[0] == "--config-name" and rest[2] == "--jobs":
    for step in yaml.safe_load(open(f"conf/{{rest[1]}}.yaml"))["pipeline"]["steps"]:
        if not os.path.exists(f"recipes/{{step['recipe']}}.py"):
            sys.exit("a library's warning\\nerror: pipeline.steps: no recipe " + step["recipe"])
        print(open(f"recipes/{{step['recipe']}}.py").read(), step.get("name", step["recipe"]), step["recipe"],
              *step.get("overrides", []), sep="\\t")
"""
STEPS = """
pipeline:
  steps:
    - {recipe: import_hf}
    - {recipe: prune, name: "prune, to (depth)",
       overrides: ["prune.target={num_layers: 3}", "prune.output=${run_dir}/a b"]}
    - recipe: distill
    - {recipe: distill, name: baseline, overrides: [distill.kl_weight=0]}
    - recipe: evaluate
"""


@pytest.fixture
def repository(tmp_path):
    """A checkout with a space in its name, recipes that only say what they are, commands that only take notes."""
    root = tmp_path / "my repository"
    for folder in ("recipes", "conf", ".venv/bin", "bin"):
        (root / folder).mkdir(parents=True)
    shutil.copytree(ROOT / "launch", root / "launch")
    for recipe, processes in PROCESSES.items():
        (root / "recipes" / f"{recipe}.py").write_text(processes)
    shutil.copy(ROOT / "conf" / "llama31_width.yaml", root / "conf")
    (root / "conf" / "steps.yaml").write_text(STEPS)
    (root / "conf" / "unknown.yaml").write_text("pipeline: {steps: [{recipe: prune}, {recipe: destill}]}")
    executable(root / ".venv/bin/python", PYTHON)
    for command in ("docker", "enroot"):
        executable(root / "bin" / command, RECORDER)
    executable(root / "bin" / "scontrol", "#!/bin/sh\nprintf 'node7\\nnode8\\n'\n")
    # As srun does inside a container: the question is answered, among an image's own lines.
    executable(
        root / "bin" / "srun",
        f"""{RECORDER}
[[ " $* " != *" --processes "* ]] || {{ echo "== PyTorch =="; cat "${{@: -2:1}}"; echo; echo "a notice" >&2; }}
""",
    )
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
           "SLURM_CPUS_ON_NODE": "96", "SLURM_JOB_NODELIST": "node[7-10]"}  # fmt: skip
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
        str(repository / "bin/srun"), "--cpus-per-task=12", "--kill-on-bad-exit=1", "--label",
        str(repository / ".venv/bin/python"), "recipes/distill.py", "--config-name", "llama31_width",
        "trainer.num_nodes=4", "trainer.devices=8", *AWKWARD,
    ]  # fmt: skip
    assert not (repository / "pwned").exists()


@pytest.mark.parametrize(
    ("variables", "cores"),
    [
        ({"SLURM_CPUS_ON_NODE": "64"}, 8),
        ({"SLURM_CPUS_ON_NODE": "30"}, 3),  # what is left over stays idle
        ({"SLURM_CPUS_ON_NODE": "4"}, 1),
        ({"SLURM_NTASKS": "16"}, 24),
        ({"SLURM_CPUS_PER_TASK": "5"}, 5),  # asked for with --cpus-per-task
    ],
)
def test_every_task_gets_its_share_of_the_cores_of_its_node(repository, variables, cores):
    slurm(repository, "distill", "llama31_width", **variables)
    assert words(repository)[1] == f"--cpus-per-task={cores}"


def test_job_asks_for_no_cores_that_a_node_may_not_have():
    header = re.findall(r"^#SBATCH (\S+)", (ROOT / "launch" / "slurm.sbatch").read_text(), re.MULTILINE)
    assert not [option for option in header if "cpus" in option or "cores" in option]
    assert {"--ntasks-per-node=8", "--gpus-per-node=8", "--exclusive"} <= set(header)


def test_ranks_meet_at_the_first_node_on_a_port_of_their_job(repository):
    slurm(repository, "distill", "llama31_width")
    assert (repository / "record.master").read_text() == f"node7:{20000 + 123456 % 20000}\n"


def test_single_process_steps_run_as_one_task_with_the_whole_node(repository):
    slurm(repository, "prune", "llama31_width", "seed=7")
    assert words(repository)[1:] == [
        "--nodes=1", "--ntasks=1", "--cpus-per-task=96", "--kill-on-bad-exit=1", "--label",
        str(repository / ".venv/bin/python"), "recipes/prune.py", "--config-name", "llama31_width", "seed=7",
    ]  # fmt: skip


def test_slurm_in_a_container_asks_and_runs_in_it_with_the_repository_at_its_own_path(repository):
    image = {"CONTAINER_IMAGE": "/images/m n.sqsh", "CONTAINER_MOUNTS": "/d:/d", "VENV": "/nowhere"}
    container = [
        "--container-image=/images/m n.sqsh", f"--container-workdir={repository}",
        f"--container-mounts={repository}:{repository},/d:/d", "--no-container-mount-home", "env",
        f"PYTHONPATH={repository}", "python",
    ]  # fmt: skip
    srun = str(repository / "bin/srun")
    result = slurm(repository, "evaluate", "llama31_width", "x=a b", **image)
    assert result.returncode == 0, result.stderr
    assert words(repository) == [
        srun, "--nodes=1", "--ntasks=1", *container, "recipes/evaluate.py", "--processes",
        srun, "--cpus-per-task=12", "--kill-on-bad-exit=1", "--label", *container, "recipes/evaluate.py",
        "--config-name", "llama31_width", "trainer.num_nodes=4", "trainer.devices=8", "x=a b",
    ]  # fmt: skip


def test_unknown_recipe_is_refused_with_those_on_disk(repository):
    (repository / "recipes" / "align.py").write_text("ranks")
    result = slurm(repository, "destill", "llama31_width")
    assert result.stderr == (
        "error: unknown recipe 'destill': there are align distill evaluate import_hf pipeline prepare_data prune\n"
    )


@pytest.mark.parametrize(
    "answer", ["", "echo two; echo ones", "echo one; exit 1", 'echo "ImportError: torch" >&2; exit 1']
)
def test_a_recipe_that_does_not_say_what_it_is_is_refused(repository, answer):
    executable(repository / ".venv/bin/python", f"#!/bin/sh\necho first >&2\n{answer}\n")
    result = slurm(repository, "distill", "llama31_width")
    assert result.returncode == 2
    assert re.fullmatch(r"error: recipes/distill\.py --processes did not answer [^\n]+\n", result.stderr)
    assert "ImportError: torch" in result.stderr or "ImportError" not in answer
    assert not (repository / "record").exists()


def test_scripts_know_no_recipes():
    names = {path.stem for path in (ROOT / "recipes").glob("*.py")} - {
        "pipeline",
        "distill",
    }  # a script's own, examples
    assert len(names) > 8
    for script in ("slurm.sbatch", "pipeline.sh"):
        code = re.sub(r"^\s*#.*", "", (ROOT / "launch" / script).read_text(), flags=re.MULTILINE)
        assert not [name for name in names if re.search(rf"\b{name}\b", code)], script


@pytest.mark.parametrize(
    ("script", "arguments", "variables"),
    [
        ("slurm.sbatch", [], {}),
        ("slurm.sbatch", ["distill"], {}),
        ("slurm.sbatch", ["destill", "llama31_width"], {}),
        ("slurm.sbatch", ["../recipes/prune", "llama31_width"], {}),
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
        ("pipeline.sh", ["../conf/steps"], {}),
        ("pipeline.sh", ["steps"], {"NODES": "many"}),
        ("pipeline.sh", ["steps"], {"STEPS": "prune destill"}),
        ("pipeline.sh", ["steps"], {"STEPS": "prepare_data"}),
        ("pipeline.sh", ["steps"], {"VENV": "/nowhere"}),
        ("pipeline.sh", ["steps"], {"PYTHON": "no-such-python"}),
        ("pipeline.sh", ["steps"], {"PYTHON": "false"}),
        ("pipeline.sh", ["steps"], {"PYTHON": "echo"}),
        ("pipeline.sh", ["unknown"], {}),
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


def jobs(root):
    """The words of every sbatch."""
    noted, found = words(root), []
    for word in noted:
        if word == str(root / "bin/sbatch"):
            found.append([])
        else:
            found[-1].append(word)
    return found


def test_pipeline_submits_the_steps_of_the_config_each_after_the_one_before(repository):
    result = launch(repository, "pipeline.sh", "steps", *AWKWARD, NODES="16", SBATCH="--account=me --qos=high")
    assert result.returncode == 0, result.stderr
    steps = [
        ("import_hf", "import_hf", 1, []),
        ("prune--to--depth-", "prune", 1, ["prune.target={num_layers: 3}", "prune.output=${run_dir}/a b"]),
        ("distill", "distill", 16, []),
        ("baseline", "distill", 16, ["distill.kl_weight=0"]),
        ("evaluate", "evaluate", 16, []),
    ]
    submitted = jobs(repository)
    assert len(submitted) == len(steps)
    for index, (job, (label, recipe, nodes, overrides)) in enumerate(zip(submitted, steps, strict=True)):
        wait = [f"--dependency=afterok:{100 + index}", "--kill-on-invalid-dep=yes"] if index else []
        assert job == [
            "--parsable", f"--job-name=steps-{label}", "--account=me", "--qos=high", f"--nodes={nodes}", *wait,
            "launch/slurm.sbatch", recipe, "steps", *AWKWARD, *overrides,
        ]  # fmt: skip
    assert not (repository / "pwned").exists()
    labels = ["import_hf", "prune, to (depth)", "distill", "baseline", "evaluate"]
    lines = [re.fullmatch(r"(.+?) +job (\d+)", line) for line in result.stdout.splitlines()]
    assert [line.groups() for line in lines] == [(label, str(101 + n)) for n, label in enumerate(labels)]


def test_pipeline_checks_the_chain_with_the_nodes_and_words_that_the_jobs_get(repository):
    launch(repository, "pipeline.sh", "steps", *AWKWARD, NODES="16")
    asked = ["recipes/pipeline.py", "--config-name", "steps", "--jobs", "trainer.num_nodes=16", *AWKWARD]
    assert (repository / "record.asked").read_text() == f"{asked!r}\n"


@pytest.mark.parametrize("word", [*AWKWARD, "  spaces  ", "\\t\\n\\", "-n", "#"])
def test_awkward_overrides_of_a_step_reach_its_recipe(repository, word):
    """Through both scripts: from the config to sbatch, and from the job to the recipe."""
    step = {"recipe": "distill", "overrides": ["a=1", word, "b=2"]}
    (repository / "conf" / "steps.yaml").write_text(yaml.safe_dump({"pipeline": {"steps": [step]}}))
    result = launch(repository, "pipeline.sh", "steps", "c=3")
    assert result.returncode == 0, result.stderr
    (job,) = jobs(repository)
    arguments = job[job.index("launch/slurm.sbatch") + 1 :]
    assert arguments == ["distill", "steps", "c=3", "a=1", word, "b=2"]
    (repository / "record").unlink()
    slurm(repository, *arguments)
    assert words(repository)[-4:] == ["c=3", "a=1", word, "b=2"]


def test_pipeline_submits_a_part_when_asked(repository):
    result = launch(repository, "pipeline.sh", "steps", STEPS="distill prune")
    assert result.returncode == 0, result.stderr
    submitted = jobs(repository)
    assert [job[job.index("launch/slurm.sbatch") + 1] for job in submitted] == ["prune", "distill", "distill"]
    assert [[word for word in job if "afterok" in word] for job in submitted] == [
        [], ["--dependency=afterok:101"], ["--dependency=afterok:102"],
    ]  # fmt: skip


def test_pipeline_passes_on_why_a_config_is_refused(repository):
    result = launch(repository, "pipeline.sh", "unknown")
    assert result.stderr == "error: pipeline.steps: no recipe destill\n"


def test_pipeline_reads_the_config_with_the_python_it_is_given(repository):
    (repository / ".venv").rename(repository / "other env")
    result = launch(repository, "pipeline.sh", "steps", VENV="other env")
    assert result.returncode == 0, result.stderr
    result = launch(
        repository, "pipeline.sh", "steps", PYTHON=str(repository / "other env/bin/python"), VENV="/nowhere"
    )
    assert result.returncode == 0, result.stderr


def test_pipeline_says_which_job_slurm_refused(repository):
    sbatch = repository / "bin" / "sbatch"
    executable(sbatch, sbatch.read_text() + "[[ $* != *prune.output* ]]\n")
    result = launch(repository, "pipeline.sh", "steps")
    assert result.returncode == 1
    assert result.stderr == "error: sbatch refused prune, to (depth); the jobs above it are in the queue\n"
    assert len(jobs(repository)) == 2


def test_scripts_and_recipes_speak_the_same(repository):
    """The real recipes and the real quickstart, of which only sbatch is none."""
    environment = {**os.environ, "PATH": f"{repository}/bin:{os.environ['PATH']}", "PYTHON": sys.executable,
                   "RECORD": str(repository / "record")}  # fmt: skip
    result = subprocess.run(["bash", "launch/pipeline.sh", "quickstart"], cwd=ROOT, env=environment,
                            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert result.returncode == 0, result.stderr
    config = yaml.safe_load((ROOT / "conf" / "quickstart.yaml").read_text())
    models = config["report"]["models"]
    steps = [step for step in config["pipeline"]["steps"] for _ in (models if "models" in step else [None])]
    submitted = jobs(repository)
    assert [job[job.index("launch/slurm.sbatch") + 1] for job in submitted] == [step["recipe"] for step in steps]
    assert "evaluate.checkpoint=runs/quickstart/teacher.nemo" in [job[-1] for job in submitted]
    for recipe, processes in (("prune", "one"), ("distill", "ranks")):
        ask = [sys.executable, f"recipes/{recipe}.py", "--processes"]
        assert subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout == f"{processes}\n"


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


def test_dockerfile_fails_where_a_pipe_fails_and_keeps_a_pre_release_of_torch():
    text = (ROOT / "Dockerfile").read_text()
    assert text.index('SHELL ["/bin/bash", "-o", "pipefail", "-c"]') < text.index("RUN ")
    listed = re.search(r"grep -iE '(\^\(torch.*?==)'", text)
    assert listed is not None
    # What `pip list --format=freeze` says in such an image, and what of it must not move.
    image = ["torch==2.10.0a0+b558c986e8.nv25.11", "transformer_engine==2.9.0", "torchdata==0.1", "Jinja2==3.1.6"]
    kept = [line for line in image if re.match(listed[1], line, re.IGNORECASE)]
    assert kept == image[:2]
    assert "grep -q '^torch==' /tmp/keep.txt" in text
