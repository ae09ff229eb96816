"""Bad input ends with one line and exit code 2, and nothing that exists is changed; a dry run writes nothing."""

import copy
import importlib
import logging
import os
import shutil
import subprocess
import sys

import pytest
from tiny_run import ROOT, tree, write_tiny_run

from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.cli import run_command
from minitron_nemo.config.compose import CONF_DIR, compose
from minitron_nemo.shape.arch import billions
from minitron_nemo.steps.execute import execute
from recipes.pipeline import main as run_pipeline

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem not in ("pipeline", "audit"))
CONFIGS = sorted(path.stem for path in CONF_DIR.glob("*.yaml") if path.stem != "convert")  # which has no model


def recipe(name):
    return importlib.import_module(f"recipes.{name}").RECIPE


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tiny config and, under `run`, what the recipes read; made once by the recipes themselves."""
    folder = tmp_path_factory.mktemp("place")
    config_dir, run = write_tiny_run(folder)

    def make(name, *overrides):
        assert run_command(recipe(name), ["--config-name", "tiny", "--config-dir", str(config_dir), *overrides]) == 0

    make("train_tokenizer")
    make("prepare_data")
    for name, *overrides in (
        ("teacher",), ("corrected_teacher",), ("wide", "model.hidden_size=48", "model.ffn_hidden_size=72"),
    ):  # fmt: skip
        make("random_init", f"random_init.output={run}/{name}.nemo", *overrides)
    # A tokenizer with fewer merges that fits the same vocabulary: only its ids mean something else.
    make("train_tokenizer", "train_tokenizer.vocab_size=290", f"train_tokenizer.output={run}/strange_tokenizer")
    make("random_init", f"random_init.tokenizer={run}/strange_tokenizer", f"random_init.output={run}/stranger.nemo")
    make("export_hf", f"export_hf.checkpoint={run}/wide.nemo")
    make("estimate_importance", "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false")
    make("prune")
    shutil.copytree(run / "teacher.nemo", run / "damaged.nemo")
    (shard,) = (run / "damaged.nemo" / "model_weights").glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-100])
    shutil.copytree(run / "corrected_teacher.nemo", run / "flipped.nemo")
    (shard,) = (run / "flipped.nemo" / "model_weights").glob("*.distcp")
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    shutil.copytree(run / "importance", run / "doubtful_importance")
    scores = run / "doubtful_importance" / "scores.safetensors"
    raw = bytearray(scores.read_bytes())
    raw[-3] ^= 1  # of the mantissa of a score
    scores.write_bytes(raw)
    (folder / "notes").mkdir()
    for name, damage in (("no", None), ("half", 0.5), ("other", '{"model": {"type": "BPE"}}')):
        copy = shutil.copytree(run / "wide_hf", folder / "notes" / f"{name}_tokenizer")
        text = (copy / "tokenizer.json").read_text()
        (copy / "tokenizer.json").unlink()
        if damage is not None:
            text = damage if isinstance(damage, str) else text[: int(len(text) * damage)]
            (copy / "tokenizer.json").write_text(text)
    (folder / "notes" / "precious.txt").write_text("not yours")
    (folder / "notes" / "precious.json").write_text("{}")
    return folder


WIDE = ["model.hidden_size=48", "model.ffn_hidden_size=72", "import_hf.output={}/new.nemo"]
# recipe, overrides ({} is the run folder, {notes} a folder of something else), what the line must say
BAD_INPUT = [
    # keys and values
    ("distill", ["trainer.device=2"], "trainer.device"),
    ("distill", ["+trainer.device=2"], "trainer.device"),
    ("distill", ["+distill.training.optim.momentum=1"], "distill.training.optim.momentum"),
    ("distill", ["+surprise=1"], "surprise"),
    ("prepare_data", ["+prepare_data.corpora.first.encoding=latin"], "prepare_data.corpora.first.encoding"),
    ("distill", ["trainer.devices=two"], "trainer.devices"),
    ("distill", ["data.seq_length=1.5"], "data.seq_length"),
    ("distill", ["parallel.sequence_parallel=perhaps"], "parallel.sequence_parallel"),
    ("estimate_importance", ["estimate_importance.batch_aggregation=median"], "batch_aggregation"),
    ("distill", ["trainer"], "trainer"),
    ("distill", ["distill.training.global_batch_size=3"], "global_batch_size=3"),
    ("distill", ["distill.temperature=0"], "temperature"),
    ("distill", ["data.split='90,10'"], "data.split"),
    # layouts
    ("correct_teacher", ["trainer.devices=3", "parallel.tensor_model_parallel_size=3", "data.seq_length=33"],
     "must divide the model's num_attention_heads=4"),
    ("distill", ["trainer.devices=4", "parallel.tensor_model_parallel_size=4"], "num_query_groups=2"),
    ("distill", ["trainer.devices=3"], "trainer.devices=3"),
    ("distill", ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false",
                 "parallel.pipeline_model_parallel_size=2", "parallel.student_stage_layers=[1,1]"], "add up to 3"),
    ("correct_teacher", ["data.seq_length=128"], "at most 64 positions"),
    # targets and plans
    ("prune", ["prune.target.hidden_size=40"], "hidden_size=40"),
    ("prune", ["prune.target.num_attention_heads=3"], "num_query_groups=2"),
    ("prune", ["prune.target.drop_layers=[4]"], "counted from 1 to 3"),
    ("prune", ["prune.plan={}/width_pruned.nemo/plan.json", "prune.checkpoint={}/wide.nemo"], "plan.json was made for"),
    ("prune", ["prune.checkpoint={}/wide.nemo", "prune.target.hidden_size=24"], "importance"),
    ("prune", ["prune.plan={notes}/precious.txt"], "cannot be read as a plan"),
    # data and tokenizers
    ("correct_teacher", ["+data.blend.absent=1.0"], "data.blend.absent"),
    ("estimate_importance", ["estimate_importance.first_sample=4"], "first_sample=4: must be below num_samples=4"),
    ("estimate_importance", ["estimate_importance.first_sample=2", "estimate_importance.take_samples=3"],
     "only 2 samples of the set are left"),
    ("estimate_importance", ["estimate_importance.criteria.num_layers=taste"], "must be one of cosine, taylor"),
    ("merge_importance", [], "merge_importance.inputs=[]: give score folders"),
    ("merge_importance", ["merge_importance.inputs=[{}/teacher.nemo]"], "is a model artefact; a importance"),
    ("merge_importance", ["merge_importance.inputs=[{}/doubtful_importance]"], "damaged: its SHA-256"),
    ("compare_importance", [], "compare_importance.inputs is empty"),
    ("compare_importance", ["compare_importance.inputs=[{}/importance]"], "in one part: only sets"),
    ("estimate_importance", ["prepare_data.output={}/nowhere", "overwrite=true"], "data.blend.first"),
    ("prepare_data", ["prepare_data.corpora.first.input={}/nowhere"], "no such file or folder"),
    ("prepare_data", ["prepare_data.tokenizer={notes}"], "tokenizer.json"),
    ("correct_teacher", ["correct_teacher.checkpoint={}/stranger.nemo"], "tokenizer"),
    ("distill", ["distill.checkpoint={}/stranger.nemo"], "different tokenizers"),
    ("evaluate", ["evaluate.checkpoint={}/stranger.nemo"], "different tokenizers"),
    ("random_init", ["model.qk_layernorm=false", "random_init.output={}/new.nemo"],
     "model.qk_layernorm=False: no Qwen3ForCausalLM has that"),
    ("random_init", ["model.vocab_size=200", "random_init.output={}/new.nemo"], "the tokenizer has 300 ids"),
    # what is not a model
    ("distill", ["distill.checkpoint={notes}"], "is not a .nemo model folder"),
    ("distill", ["distill.teacher={}/nowhere.nemo"], "no such folder"),
    ("correct_teacher", ["correct_teacher.checkpoint={}/damaged.nemo"], "bytes"),
    ("estimate_importance", ["estimate_importance.checkpoint={}/data"], "is a data artefact; a model"),
    ("evaluate", ["evaluate.checkpoint={notes}"], "is not a .nemo model folder"),
    ("export_hf", ["export_hf.checkpoint={notes}"], "is not a .nemo model folder"),
    ("prune", ["prune.checkpoint={}/flipped.nemo", "prune.target.ffn_hidden_size=32", "overwrite=true"],
     "flipped.nemo/model_weights/__0_0.distcp: damaged"),
    ("export_hf", ["export_hf.checkpoint={}/flipped.nemo", "export_hf.output={}/wide_hf", "overwrite=true"],
     "flipped.nemo/model_weights/__0_0.distcp: damaged"),
    ("import_hf", ["import_hf.source={notes}"], "is not a Hugging Face model folder"),
    ("import_hf", ["import_hf.source=nowhere"], "no such folder"),
    ("import_hf", [*WIDE, "import_hf.source={notes}/no_tokenizer"], "no tokenizer.json"),
    ("import_hf", [*WIDE, "import_hf.source={notes}/half_tokenizer"], "tokenizer.json: not JSON"),
    ("import_hf", [*WIDE, "import_hf.source={notes}/other_tokenizer"], "tokenizers library cannot open it"),
    ("import_hf", ["import_hf.source={}/wide_hf"],
     "hidden_size=48, ffn_hidden_size=72; the config's model has hidden_size=32, ffn_hidden_size=64"),
    # outputs that belong to something else
    ("correct_teacher", ["correct_teacher.output={notes}"], "exists"),
    ("correct_teacher", ["correct_teacher.output={notes}", "overwrite=true"], "never overwritten"),
    ("export_hf", ["export_hf.checkpoint={}/teacher.nemo", "export_hf.output={notes}", "overwrite=true"],
     "never overwritten"),
    ("train_tokenizer", ["train_tokenizer.output={notes}", "overwrite=true"], "never overwritten"),
    ("evaluate", ["evaluate.checkpoint={}/teacher.nemo", "evaluate.output={notes}/precious.json", "overwrite=true"],
     "never overwritten"),
    ("random_init", ["random_init.output={}/teacher.nemo", "seed=2"], "made by another configuration"),
    ("prune", ["prune.importance={}/doubtful_importance", "prune.output={}/new.nemo"], "damaged: its SHA-256"),
    ("distill", ["distill.output={}/corrected_teacher.nemo", "overwrite=true"], "which this step reads"),
    ("prune", ["prune.output={}/corrected_teacher.nemo", "overwrite=true"], "which this step reads"),
    ("prune", ["prune.output={}/importance", "overwrite=true"], "which this step reads"),
    ("correct_teacher", ["correct_teacher.output={}/data", "overwrite=true"], "is a data artefact"),
    ("random_init", ["random_init.output={}/tokenizer", "overwrite=true"], "which this step reads"),
    ("report", [], "eval"),
]  # fmt: skip


def arguments(place, overrides, config="tiny"):
    filled = [text.replace("{notes}", str(place / "notes")).replace("{}", str(place / "run")) for text in overrides]
    return ["--config-name", config, "--config-dir", str(place / "conf"), *filled]


def check_refusal(code: int, stderr: str, *, says: str) -> None:
    assert code == 2, stderr
    assert stderr.startswith("error: "), stderr
    assert stderr.count("\n") == 1, f"not one line: {stderr}"
    assert says in stderr


@pytest.mark.parametrize(("name", "overrides", "says"), BAD_INPUT, ids=lambda value: str(value)[:60])
def test_bad_input_ends_with_one_line_and_changes_nothing(name, overrides, says, place, capsys):
    before = tree(place)
    code = run_command(recipe(name), arguments(place, overrides))
    check_refusal(code, capsys.readouterr().err, says=says)
    assert tree(place) == before


def test_an_import_says_where_the_folder_and_not_the_config_counts(place, tmp_path, caplog):
    output = tmp_path / "wide.nemo"
    same = [
        "import_hf.source={}/wide_hf",
        "model.hidden_size=48",
        "model.ffn_hidden_size=72",
        f"import_hf.output={output}",
    ]
    caplog.set_level(logging.INFO, logger="minitron_nemo")
    assert run_command(recipe("import_hf"), arguments(place, [*same, "model.rotary_base=5000"])) == 0
    assert "rotary_base=10000.0; the config's model has rotary_base=5000.0: the folder's is used" in caplog.text
    assert open_nemo(output).arch.rotary_base == 10000.0


def test_a_config_without_model_sizes_imports(place, tmp_path):
    (tmp_path / "plain.yaml").write_text(f"defaults: [schema, _self_]\nname: plain\nrun_dir: {tmp_path}\n")
    command = ["--config-name", "plain", "--config-dir", str(tmp_path), f"import_hf.source={place}/run/wide_hf"]
    assert run_command(recipe("import_hf"), command) == 0
    assert open_nemo(tmp_path / "teacher.nemo").arch.hidden_size == 48


@pytest.mark.parametrize(
    ("name", "override", "changes"),
    [
        ("evaluate", "trainer.precision=fp32", False),  # what `auto` means on a CPU
        ("evaluate", "trainer.precision=bf16", True),
        ("estimate_importance", "trainer.precision=bf16", True),
        ("estimate_importance", "estimate_importance.micro_batch_size=1", False),
        ("estimate_importance", "estimate_importance.batch_aggregation=mean", True),
        ("correct_teacher", "correct_teacher.training.optim.eps=1e-5", True),
        ("correct_teacher", "correct_teacher.training.keep_latest_k=5", False),
        ("distill", "distill.chunk_tokens=7", False),
        ("distill", "distill.temperature=2", True),
        ("distill", "data.split='70,30,0'", True),
        ("distill", "seed=5", True),
        ("distill", "parallel.use_distributed_optimizer=false", False),
        ("prune", "prune.target.num_layers=2", True),
    ],
)
def test_the_fingerprint_changes_with_what_is_made_and_not_with_how_it_runs(name, override, changes, place):
    run = place / "run"
    inputs = [f"distill.checkpoint={run}/teacher.nemo", f"evaluate.checkpoint={run}/teacher.nemo"]

    def fingerprint(*more):
        config = compose("tiny", [*inputs, *more], config_dir=place / "conf")
        return recipe(name).prepare(config).origin.fingerprint

    assert (fingerprint(override) != fingerprint()) == changes


def test_an_unknown_config_is_refused_with_the_names_there_are(place, capsys):
    code = run_command(recipe("prune"), arguments(place, [], config="large"))
    check_refusal(code, capsys.readouterr().err, says="tiny")


def test_the_pipeline_checks_every_step_before_the_first_runs(place, capsys):
    before = tree(place)
    for overrides, says in ((["+surprise=1"], "surprise"), (["distill.temperature=0"], "temperature")):
        code = run_pipeline(arguments(place, overrides))
        check_refusal(code, capsys.readouterr().err, says=says)
    assert tree(place) == before


def test_scripts_refuse_as_their_functions_do(place):
    """Started together, as most of their time is importing."""
    commands = {
        "wrong type": ("distill", arguments(place, ["trainer.devices=two"]), "trainer.devices"),
        "not a model": ("correct_teacher", arguments(place, ["correct_teacher.checkpoint={notes}"]), "not a .nemo"),
    }
    before = tree(place)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, f"recipes/{script}.py", *rest],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script, rest, _ in commands.values()
    ]
    for process, (_, _, says) in zip(started, commands.values(), strict=True):
        _, stderr = process.communicate(timeout=120)
        check_refusal(process.returncode, stderr, says=says)
    assert tree(place) == before


@pytest.mark.parametrize("config", CONFIGS)
def test_a_dry_run_shows_both_models_and_writes_nothing(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where no checkpoint is
    composed = compose(config, ["dry_run=true"])
    teacher = composed.model_arch()
    student = composed.prune.target.shrink(teacher)
    counts = [f"{billions(arch.num_params())} parameters" for arch in (teacher, student)]
    for name in RECIPES:
        if (config, name) == ("quickstart", "distill"):
            assert run_command(recipe(name), ["--config-name", config, "dry_run=true"]) == 0, name
        else:  # what the command line does with a config once it is composed
            execute(recipe(name), copy.deepcopy(composed))
        printed = capsys.readouterr().out
        assert all(count in printed for count in counts), f"{name}: {printed}"
        assert printed.startswith(f"{name} of {config}: dry run")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_the_pipeline_goes_through_every_step(tmp_path, monkeypatch, capsys):
    config = "llama31_width"  # test_launch.py asks the quickstart for its 32 steps
    monkeypatch.chdir(tmp_path)
    assert run_pipeline(["--config-name", config, "dry_run=true"]) == 0
    steps = sum(len(step.models) or 1 for step in compose(config).pipeline.steps)
    assert capsys.readouterr().out.count("dry run, nothing is allocated or written") == steps
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_what_a_run_would(capsys):
    overrides = ["dry_run=true", "trainer.devices=16", "parallel.tensor_model_parallel_size=16"]
    check_refusal(
        run_command(recipe("distill"), ["--config-name", "llama31_width", *overrides]), capsys.readouterr().err,
        says="num_query_groups=8",
    )  # fmt: skip


def test_every_recipe_explains_itself(capsys):
    for name in RECIPES:
        assert run_command(recipe(name), ["--help"]) == 0
        # The help begins with the recipe's own docstring.
        docstring = importlib.import_module(f"recipes.{name}").__doc__
        assert docstring.split()[0] in capsys.readouterr().out
