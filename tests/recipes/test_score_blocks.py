"""The recipe of blocks, its folder, and the depth plan that prune makes of it."""

import importlib
import json

import pytest
from tiny_run import write_tiny_run

from minitron_nemo.artefacts.manifest import read_manifest, verify_files
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.cli import run_command
from minitron_nemo.importance.blocks import read_blocks
from minitron_nemo.pruning.plan import read_plan

WORDS = "the model forgets what it was never asked".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run folder, a function that runs a recipe) with a model of four layers, its blocks and its importance."""
    folder = tmp_path_factory.mktemp("run")
    config_dir, run_dir = write_tiny_run(folder)

    def make(name, *overrides, code=0):
        recipe = importlib.import_module(f"recipes.{name}").RECIPE
        shape = ["model.num_layers=4", "prune.target={hidden_size: null, ffn_hidden_size: null, num_layers: 2}"]
        arguments = ["--config-name", "tiny", "--config-dir", str(config_dir), *shape, *overrides]
        assert run_command(recipe, arguments) == code

    records = [
        {"sentence": f"{first} _ {last} again", "option1": "the model", "option2": "one", "answer": "1"}
        for first, last in zip(WORDS, WORDS[1:], strict=False)
    ]
    (folder / "wino.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    make("train_tokenizer")
    make("prepare_data")
    make("random_init", f"random_init.output={run_dir}/corrected_teacher.nemo", "random_init.init_method_std=0.2")
    task = f"+score_blocks.tasks.wino={{form: winogrande, input: {folder}/wino.jsonl, num_examples: 5}}"
    options = [task, "score_blocks.num_samples=4", "score_blocks.micro_batch_size=2"]
    make("score_blocks", *options)
    make("estimate_importance")
    return run_dir, make, options


def test_the_folder_is_an_artefact_with_scores_table_and_plot(run):
    run_dir, make, options = run
    manifest = read_manifest(run_dir / "blocks", kind="blocks")
    verify_files(run_dir / "blocks", manifest)
    assert set(manifest.files) == {"blocks.json", "blocks.md", "blocks.svg", "calibration_text.safetensors"}
    assert manifest.parents == {"model": open_nemo(run_dir / "corrected_teacher.nemo").sha256}
    scores = read_blocks(run_dir / "blocks")
    assert scores.lengths == [1, 2], "one layer, and what the target drops"
    assert list(scores.values) == ["cosine", "lm_loss", "nmse", "task"]
    assert scores.tasks["wino"]["examples"] == 5
    facts = json.loads((run_dir / "blocks" / "blocks.json").read_text())
    assert (facts["num_samples"], facts["seq_length"], facts["tokens"]) == (4, 32, 128)
    assert len(facts["data_fingerprint"]) == 64
    before = (run_dir / "blocks" / "blocks.json").stat().st_mtime_ns
    make("score_blocks", *options, "score_blocks.micro_batch_size=1")
    assert (run_dir / "blocks" / "blocks.json").stat().st_mtime_ns == before, "it was there already"
    make("score_blocks", *options, "score_blocks.lengths=[3]", code=2)


def test_the_same_samples_as_those_of_importance_give_its_block_importance(run):
    run_dir, _, _ = run
    layers = json.loads((run_dir / "importance" / "scores.json").read_text())["layers"]
    importance = [layer["block_importance"] for layer in layers]
    assert read_blocks(run_dir / "blocks").of("cosine", 1) == pytest.approx(importance, rel=1e-5)


@pytest.mark.parametrize("measure", ["cosine", "lm_loss", "nmse", "task"])
def test_prune_drops_the_best_block(measure, run):
    run_dir, make, _ = run
    output = run_dir / f"by_{measure}.nemo"
    # No importance is needed, or read.
    make("prune", f"prune.target.drop_by={measure}", f"prune.output={output}", "prune.importance=/nowhere")
    scores = read_blocks(run_dir / "blocks")
    plan = read_plan(output / "plan.json")
    assert plan.dropped_layers() == scores.best_block(measure, 2)
    values = scores.of(measure, 2)
    first = plan.dropped_layers()[0]
    assert values[first - 1] == (max(values) if measure == "task" else min(values))
    manifest = read_manifest(output, kind="model")
    assert set(manifest.parents) == {"model", "blocks"}
    assert manifest.extra["proof"]["tokens"] == "calibration", "the text that the blocks were scored on"


def test_importance_is_asked_for_where_units_or_layers_are_chosen_by_it(run, capsys):
    run_dir, make, _ = run
    nowhere, output = "prune.importance=/nowhere", f"prune.output={run_dir}/listed.nemo"
    by_loss = "prune.target.drop_by=lm_loss"
    capsys.readouterr()
    for asked in (
        [],  # layers by block importance
        [by_loss, "prune.target.hidden_size=24"],
        [by_loss, "prune.repairs.norm_scale=true"],
        ["prune.target.num_layers=null", "+prune.target.budget={parameters: 1e9, axes: [num_layers]}"],
    ):
        make("prune", *asked, nowhere, output, code=2)
        assert "/nowhere" in capsys.readouterr().err, asked
    make("prune", "prune.target.drop_layers=[1,3]", nowhere, output)
    manifest = read_manifest(run_dir / "listed.nemo", kind="model")
    assert set(manifest.parents) == {"model"}
    assert manifest.extra["proof"]["tokens"] == "random", "no scores, no text"


def test_prune_drops_the_layers_that_are_best_alone_and_says_when_another_model_was_scored(run, caplog):
    run_dir, make, _ = run
    make("random_init", f"random_init.output={run_dir}/other.nemo", "seed=9")
    output = run_dir / "alone.nemo"
    drop = ["prune.target.drop_by=lm_loss", "prune.target.drop_contiguous=false", f"prune.output={output}"]
    make("prune", *drop, f"prune.checkpoint={run_dir}/other.nemo")
    assert "blocks is of another model of this shape" in caplog.text
    losses = read_blocks(run_dir / "blocks").of("lm_loss", 1)
    wanted = sorted(sorted(range(1, 5), key=lambda layer: losses[layer - 1])[:2])
    assert read_plan(output / "plan.json").dropped_layers() == wanted


def test_what_does_not_fit_is_refused_in_one_line(run, capsys, tmp_path):
    run_dir, make, options = run
    by_loss = ["prune.target.drop_by=lm_loss", f"prune.output={run_dir}/refused.nemo"]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    cases = [
        ("prune", [*by_loss, "prune.blocks=/nowhere"], "/nowhere"),
        ("prune", [*by_loss, f"prune.blocks={run_dir}/importance"], "is a importance artefact"),
        ("prune", [*by_loss, "prune.target.num_layers=1"], "3 must go"),
        ("prune", [*by_loss, "prune.target.drop_layers=[2]"], "no drop_layers"),
        ("prune", [*by_loss, f"prune.checkpoint={run_dir}/by_task.nemo"], "score that one"),
        ("score_blocks", [*options, f"score_blocks.tasks.wino.input={broken}"], f"{broken}, line 1: sentence"),
        ("score_blocks", [*options, "+score_blocks.tasks.wino.normalized=true"], "winogrande has no acc_norm"),
    ]
    capsys.readouterr()
    for name, overrides, says in cases:
        make(name, *overrides, code=2)
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1, told
        assert says in told[0]
    assert not (run_dir / "refused.nemo").exists()
