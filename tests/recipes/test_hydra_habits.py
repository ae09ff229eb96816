"""A recipe is a Hydra application: Hydra's flags work, and what they refuse is still one line and exit code 2."""

import logging
import os
import pickle
import shutil
import subprocess
import sys
import types

import pytest
import yaml

from minitron_nemo.cli import run_safely, run_task
from minitron_nemo.config.compose import CONF_DIR
from minitron_nemo.errors import UserError

NAME = ("--config-name", "llama31_width")


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """(composition, config) of every call of the stand-in's task; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipes/distill.py"])
    return []


@pytest.fixture
def start(runs):
    """Run a stand-in for a recipe; its seed says how it ends."""
    ends = {
        7: ZeroDivisionError("a defect"),
        8: UserError("refused by the task"),
        9: KeyboardInterrupt(),
        10: SystemExit(5),
    }

    def task(composition, config):
        runs.append((composition, config))
        if config.seed in ends:
            raise ends[config.seed]

    return lambda *arguments: run_task("distill", "Distil: a stand-in.\n\nMore.", task=task, arguments=arguments)


def files(folder="."):
    return sorted(os.path.relpath(os.path.join(at, name), folder) for at, _, names in os.walk(folder) for name in names)


def check_refusal(code, captured, *, says):
    assert code == 2, captured.err
    assert captured.err.startswith("error: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    assert says in captured.err
    assert captured.out == ""


# One run


def test_a_run_gets_its_config_and_leaves_no_file(start, runs):
    assert start("seed=3", *NAME, "name=x") == 0
    ((composition, config),) = runs
    assert (config.seed, config.run_dir) == (3, "runs/x")
    assert (composition.config_name, composition.overrides) == ("llama31_width", ("seed=3", "name=x"))
    assert composition.compose() == config
    assert files() == []


def test_a_run_can_compose_again_while_hydra_runs(monkeypatch, runs, capsys):
    """The pipeline composes its steps inside the task; a sweep goes on composing after it."""

    def task(composition, config):
        runs.append(composition.compose("distill.temperature=4").seed)

    assert (
        run_task("pipeline", "", task=task, arguments=[*NAME, "-m", "seed=1,2", "name=${oc.env:USER_OF_THIS,me}"]) == 0
    )
    assert runs == [1, 2]


def test_hydra_run_dir_keeps_the_config_and_nothing_else(start):
    assert start(*NAME, "hydra.run.dir=kept here", "seed=3") == 0
    assert files() == [f"kept here/.hydra/{name}.yaml" for name in ("config", "hydra", "overrides")]
    with open("kept here/.hydra/config.yaml") as file:
        assert yaml.safe_load(file)["seed"] == 3


def test_logging_stays_as_it_was(start):
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    for arguments in ((), ("--info", "defaults"), ("-m", "seed=1,2")):
        start(*NAME, *arguments)
        assert (root.level, root.handlers) == before or not before[1]
    assert not logging.getLogger("minitron_nemo").disabled


def test_the_process_is_put_back(start):
    before = (list(sys.argv), dict(os.environ))
    start(*NAME, "seed=8")
    assert (sys.argv, dict(os.environ)) == before


@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_what_the_task_raises_comes_out_as_it_is(sweep, start, capsys):
    check_refusal(
        start(*NAME, *sweep, "seed=8"), types.SimpleNamespace(out="", err=last_line(capsys)), says="refused by"
    )
    assert start(*NAME, *sweep, "seed=9") == 130
    with pytest.raises(ZeroDivisionError) as defect:
        start(*NAME, *sweep, "seed=7")
    assert "task" in [entry.name for entry in defect.traceback]
    with pytest.raises(SystemExit) as stop:
        start(*NAME, *sweep, "seed=10")
    assert stop.value.code == 5


def last_line(capsys):
    """Standard error without the announcement of a sweep's run."""
    return "".join(line for line in capsys.readouterr().err.splitlines(keepends=True) if not line.startswith("#"))


# Looking


def test_cfg_prints_the_composed_config(start, runs, capsys):
    assert start(*NAME, "--cfg", "job", "distill.temperature=3") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["distill"]["temperature"] == 3
    assert shown["prune"]["target"]["hidden_size"] == 3072
    assert start(*NAME, "--cfg", "job", "--package", "run_dir", "--resolve") == 0
    assert capsys.readouterr().out == "runs/llama31_width\n"
    assert start(*NAME, "--cfg", "hydra") == 0
    assert "hydra:" in capsys.readouterr().out
    assert (runs, files()) == ([], [])


def test_info_says_what_the_config_was_made_of(start, runs, capsys):
    assert start(*NAME, "--info", "defaults", "parallel=dgx_tp4") == 0
    shown = capsys.readouterr().out
    assert "model/llama31_8b" in shown
    assert "parallel/dgx_tp4" in shown
    assert (runs, files()) == ([], [])


def test_hydras_version_and_help(start, capsys):
    assert start("--version") == 0
    assert capsys.readouterr().out.startswith("Hydra 1.")
    assert start("--hydra-help") == 0
    assert "--multirun" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_the_recipes_own(flag, start, capsys):
    assert start(flag) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Distil: a stand-in.\n\nMore.")
    assert "distill.temperature  (float, default 1.0, above 0 and at most 1000)\n      divides both logits" in shown
    assert "distill.training.optim.lr" in shown
    assert "130 interrupted" in shown


def test_completion_knows_keys_groups_and_the_named_config(start, capsys, monkeypatch, tmp_path):
    def completed(line, *arguments):
        monkeypatch.setenv("COMP_LINE", f"python recipes/distill.py {line}")
        assert start("-sc", "query=bash", *arguments) == 0
        return capsys.readouterr().out.split()

    assert completed("distill.tem") == ["distill.temperature="]
    assert completed("--config-name llama31_width model.num_l") == ["model.num_layers="]
    assert completed("--config-name llama31_width prepare_data.corpora.") == ["prepare_data.corpora.text."]
    assert completed("--config-name llama31_width parallel=dgx") == ["parallel=dgx_tp2", "parallel=dgx_tp4"]
    assert start("-sc", "install=bash") == 0
    assert "complete -o nospace" in capsys.readouterr().out


# Sweeps


def test_multirun_runs_every_combination(start, runs, capsys):
    output = "distill.output=${run_dir}/student_t${distill.temperature}.nemo"
    assert start("-m", *NAME, "distill.temperature=1,2", "seed=range(3,5)", output) == 0
    assert [(config.distill.temperature, config.seed) for _, config in runs] == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert runs[-1][1].distill.output == "runs/llama31_width/student_t2.0.nemo"
    assert all(composition.compose() == config for composition, config in runs)
    assert [line[:2] for line in capsys.readouterr().err.splitlines()] == ["#0", "#1", "#2", "#3"]
    assert len([name for name in files() if name.endswith("overrides.yaml")]) == 4
    assert not [name for name in files() if not name.startswith("multirun/")]


def test_a_sweep_has_the_folder_it_is_told_and_ends_with_its_first_failure(start, runs):
    assert start(*NAME, "hydra.mode=MULTIRUN", "hydra.sweep.dir=sweep", "seed=1,8,2") == 2
    assert [config.seed for _, config in runs] == [1, 8]
    assert {name.split("/")[0] for name in files()} == {"sweep"}


def test_a_sweep_is_checked_before_its_first_run_as_far_as_types_go(start, runs, capsys):
    check_refusal(start(*NAME, "-m", "seed=1,x"), capsys.readouterr(), says="seed")
    assert runs == []


# Folders


@pytest.fixture
def mine(tmp_path):
    """A folder with one copied config, its path as awkward as paths get."""
    folder = tmp_path / "my configs, a=b"
    folder.mkdir()
    text = (CONF_DIR / "llama31_width.yaml").read_text().replace("name: llama31_width", "name: copied")
    (folder / "copied.yaml").write_text(text)
    (folder / "llama31_depth.yaml").write_text(text)
    (folder / "data").mkdir()
    shutil.copy(CONF_DIR / "data" / "text.yaml", folder / "data" / "own.yaml")
    return folder


@pytest.mark.parametrize("flag", ["--config-dir", "-cd", "--config-path"])
def test_a_copied_config_in_a_folder_of_its_own(flag, start, runs, mine):
    assert start(flag, str(mine), "--config-name", "copied", "data=own") == 0
    ((composition, config),) = runs
    assert (config.name, config.model.num_layers, config.parallel.tensor_model_parallel_size) == ("copied", 32, 2)
    assert composition.compose("seed=5").name == "copied"


def test_the_given_folder_is_looked_in_first_and_conf_after_it(start, runs, mine, capsys, monkeypatch):
    monkeypatch.chdir(mine)
    assert start("--config-dir", ".", "--config-name", "llama31_depth") == 0
    assert start("--config-dir", ".", "--config-name", "quickstart.yaml") == 0
    assert [config.name for _, config in runs] == ["copied", "quickstart"]
    check_refusal(
        start("--config-dir", ".", "--config-name", "nope"), capsys.readouterr(), says="copied, llama31_depth"
    )


# Refusals

REFUSED = [
    ((), "--config-name is missing: available are convert, llama31_depth"),
    (("--config-name", "nope"), "llama31_width"),
    (("--config-name",), "expected one argument"),
    ((*NAME, "--bogus"), "--bogus"),
    ((*NAME, "--cfg", "all of it"), "invalid choice"),
    ((*NAME, "--info=nope"), "invalid choice"),
    ((*NAME, "--cfg", "job", "-m"), "--multirun and --cfg"),
    ((*NAME, "--resolve"), "--cfg"),
    ((*NAME, "--cfg", "job", "--package", "nope"), "nope"),
    ((*NAME, "--cfg", "job", "+surprise=1"), "surprise: unknown key"),
    ((*NAME, "--config-dir", "/nowhere"), "no such folder"),
    ((*NAME, "-cd", ".", "-cp", "."), "one of the two"),
    ((*NAME, "trainer"), "key=value"),
    ((*NAME, "=1"), "key=value"),
    ((*NAME, "name=my", "run"), "'run'"),
    ((*NAME, "name=[1"), "name=[1"),
    ((*NAME, "+surprise=1"), "surprise: unknown key"),
    ((*NAME, "-m", "+surprise=1,2"), "surprise: unknown key"),
    ((*NAME, "seed=1,2"), "--multirun"),
    ((*NAME, "seed=-1"), "seed=-1: must be at least 0"),
    ((*NAME, "-m", "seed=-1,-2"), "seed=-1: must be at least 0"),
    ((*NAME, "hydra.nothing=1"), "hydra.nothing"),
    ((*NAME, "hydra/launcher=submitit"), "hydra/launcher"),
    ((*NAME, "-sc", "nothing=bash"), "install"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSED, ids=lambda value: " ".join(value)[-50:])
def test_refusals_are_one_line(arguments, says, start, runs, capsys):
    check_refusal(start(*arguments), capsys.readouterr(), says=says)
    assert runs == []


@pytest.mark.parametrize(
    "words", [("--experimental-rerun", "x"), ("--experimental-rerun=x",), ("--", "--experimental-rerun=x")]
)
def test_nothing_is_unpickled(words, start, runs, capsys, tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    (tmp_path / "x").write_bytes(pickle.dumps(Trap()))
    check_refusal(start(*NAME, *words), capsys.readouterr(), says="")
    assert not (tmp_path / "sprung").exists()


# The command line around it


def test_exit_codes(capsys):
    from minitron_nemo.distributed.launch import RankError

    def ends_with(error):
        def command():
            raise error

        return run_safely(command)

    assert run_safely(lambda: None) == 0
    assert ends_with(UserError("what")) == 2
    assert ends_with(RankError("rank 1 died")) == 1
    assert ends_with(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.splitlines()[:2] == ["error: what", "error: rank 1 died"]
    with pytest.raises(RuntimeError, match="ours"):
        ends_with(RuntimeError("ours"))


def test_a_defect_keeps_its_traceback_and_exits_with_1(tmp_path):
    script = (
        "import sys\nfrom minitron_nemo.cli import run_task\n"
        "def task(composition, config):\n    raise ValueError('a defect of the task')\n"
        "sys.exit(run_task('distill', '', task=task, arguments=sys.argv[1:]))\n"
    )
    (tmp_path / "recipe.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(CONF_DIR.parent)}
    command = [sys.executable, "recipe.py", *NAME]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "line 4, in task" in run.stderr
    assert run.stderr.endswith("ValueError: a defect of the task\n")
    assert files(tmp_path) == ["recipe.py"]
