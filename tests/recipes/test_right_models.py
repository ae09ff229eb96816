"""The recipes, data parallel over two ranks, use the models and samples their settings name; transformers is asked."""

import importlib
import json
import math
import shutil

import pytest
import torch
from tiny_run import write_tiny_run
from torch.nn import functional

from minitron_nemo.artefacts.manifest import manifest_sha256
from minitron_nemo.checkpoint.formats.nemo import open_nemo
from minitron_nemo.cli import run_command
from minitron_nemo.config.compose import compose
from minitron_nemo.data.datasets import batch, build_datasets
from minitron_nemo.steps.settings import blend_for

DATA_PARALLEL = [
    "trainer.devices=2",
    "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
]
# Three models far apart: what is loaded in the place of another shows in every number.
MODELS = {"student": ["seed=1"], "teacher": ["seed=2"], "stranger": ["seed=3"]}
GLOBAL_BATCH = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(run folder, a function that runs a recipe) with three models of random weights and a distillation."""
    config_dir, folder = write_tiny_run(tmp_path_factory.mktemp("run"))

    def make(name, *overrides, code=0):
        recipe = importlib.import_module(f"recipes.{name}").RECIPE
        arguments = ["--config-name", "tiny", "--config-dir", str(config_dir), *DATA_PARALLEL, *overrides]
        assert run_command(recipe, arguments) == code

    make("train_tokenizer")
    make("prepare_data")
    for name, overrides in MODELS.items():
        make("random_init", f"random_init.output={folder}/{name}.nemo", "random_init.init_method_std=0.2", *overrides)
        make("export_hf", f"export_hf.checkpoint={folder}/{name}.nemo", f"export_hf.output={folder}/{name}_hf")
    distilled = [f"distill.{role}={folder}/{name}.nemo" for role, name in
                 (("checkpoint", "student"), ("teacher", "teacher"), ("output", "trained"))]  # fmt: skip
    distilled += ["distill.check_teacher=false"]  # a model of random weights guesses worse than chance
    make("distill", *distilled, "distill.training.save_every_n_steps=0")
    return folder, make, config_dir


def records(folder, name):
    return [json.loads(line) for line in (folder / "logs" / name / "metrics.jsonl").read_text().splitlines()]


def test_the_first_step_is_the_divergence_of_the_named_models_on_the_first_samples(run):
    from transformers import AutoModelForCausalLM

    folder, _, config_dir = run
    config = compose("tiny", [], config_dir=config_dir)
    blend = blend_for(config, open_nemo(folder / "student.nemo"), purpose="distill")
    train, _ = build_datasets(blend, num_train=4 * GLOBAL_BATCH, num_valid=0)
    samples = batch(train, range(GLOBAL_BATCH))
    log_q, log_p = (
        functional.log_softmax(
            AutoModelForCausalLM.from_pretrained(folder / f"{name}_hf", dtype=torch.float32)
            .eval()(samples["tokens"])
            .logits.detach()
            .double(),
            dim=-1,
        )
        for name in ("student", "teacher")
    )
    divergence = float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
    cross_entropy = float(-log_q.gather(2, samples["labels"][..., None]).mean())
    first = records(folder, "trained")[0]
    assert divergence > 0.1, "models that are alike would prove nothing"
    assert (first["forward_kl"], first["cross_entropy"]) == pytest.approx((divergence, cross_entropy), rel=1e-5)


def test_several_teachers_teach_the_sources_that_they_are_named_for(run):
    from transformers import AutoModelForCausalLM

    folder, make, config_dir = run
    named = [f"+distill.teachers.{name}={{checkpoint: {folder}/{model}.nemo, sources: {sources}}}" for name, model,
             sources in (("one", "teacher", "{first: 3}"), ("two", "stranger", "{first: 1, second: 0.5}"))]  # fmt: skip
    make("distill", *named, f"distill.checkpoint={folder}/student.nemo", f"distill.output={folder}/taught.nemo",
         "distill.check_teacher=false", "distill.training.max_steps=1")  # fmt: skip
    manifest = open_nemo(folder / "taught.nemo").manifest
    hashes = {role: manifest_sha256(folder / f"{name}.nemo") for role, name in
              (("student", "student"), ("teacher_one", "teacher"), ("teacher_two", "stranger"))}  # fmt: skip
    assert manifest.parents == hashes
    assert manifest.config["teachers"] == {
        "one": {"sources": {"first": 3.0}}, "two": {"sources": {"first": 1.0, "second": 0.5}}
    }  # fmt: skip

    blend = blend_for(compose("tiny", [], config_dir=config_dir), open_nemo(folder / "student.nemo"), purpose="distill")
    train, _ = build_datasets(blend, num_train=GLOBAL_BATCH, num_valid=0)
    samples = batch(train, range(GLOBAL_BATCH))
    log_q, *log_ps = (
        functional.log_softmax(
            AutoModelForCausalLM.from_pretrained(folder / f"{name}_hf", dtype=torch.float32)(samples["tokens"])
            .logits.detach()
            .double(),
            dim=-1,
        )
        for name in ("student", "teacher", "stranger")
    )
    one, two = ((log_p.exp() * (log_p - log_q)).sum(dim=-1) for log_p in log_ps)
    is_first = samples["sources"] == 0
    assert 0 < is_first.sum() < is_first.numel()
    (record,) = [record for record in records(folder, "taught") if "forward_kl" in record]
    wanted = {
        "forward_kl/source_first": float((0.75 * one + 0.25 * two)[is_first].mean()),
        "forward_kl/source_second": float(two[~is_first].mean()),
        "forward_kl/teacher_one": float(one[is_first].mean()),
    }
    assert {name: record[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert record["peak_memory_bytes"] > 1e7
    split = [record[f"{name}_flops_per_second_per_rank"] for name in ("model", "student", "teacher")]
    assert split[0] == pytest.approx(sum(split[1:]))
    assert split[1] > split[2] > 0


def test_a_teacher_that_guesses_worse_than_chance_is_refused_before_the_first_step(run, capsys):
    folder, make, _ = run
    make("distill", f"distill.checkpoint={folder}/student.nemo", f"distill.teacher={folder}/teacher.nemo",
         f"distill.output={folder}/untaught.nemo", code=2)  # fmt: skip
    assert "the teacher guesses no better than chance: cross-entropy " in capsys.readouterr().err
    assert not (folder / "logs" / "untaught" / "metrics.jsonl").exists()


def test_the_last_validation_of_a_distillation_is_what_evaluate_says_of_the_student(run):
    """Same teacher, same held-out samples, same weights: said by another recipe."""
    folder, make, _ = run
    output = folder / "eval" / "trained.json"
    make("evaluate", f"evaluate.checkpoint={folder}/trained.nemo", f"evaluate.reference={folder}/teacher.nemo",
         f"evaluate.output={output}", f"evaluate.num_samples={GLOBAL_BATCH}")  # fmt: skip
    evaluated = json.loads(output.read_text())
    last = [record for record in records(folder, "trained") if "val_forward_kl" in record][-1]
    for name in ("forward_kl", "cross_entropy", "top1_agreement"):
        assert last[f"val_{name}"] == pytest.approx(evaluated[name], rel=1e-6), name
    assert evaluated["perplexity"] == pytest.approx(math.exp(evaluated["cross_entropy"]))


def test_correction_starts_from_the_named_model(run):
    from transformers import AutoModelForCausalLM

    folder, make, config_dir = run
    named = [f"correct_teacher.{role}={folder}/{name}.nemo" for role, name in
             (("checkpoint", "stranger"), ("output", "corrected"))]  # fmt: skip
    make("correct_teacher", *named, "correct_teacher.training.save_every_n_steps=0")
    config = compose("tiny", [], config_dir=config_dir)
    blend = blend_for(config, open_nemo(folder / "stranger.nemo"), purpose="correct_teacher")
    train, _ = build_datasets(blend, num_train=4 * GLOBAL_BATCH, num_valid=0)
    samples = batch(train, range(GLOBAL_BATCH))
    model = AutoModelForCausalLM.from_pretrained(folder / "stranger_hf", dtype=torch.float32).eval()
    logits = model(samples["tokens"]).logits.detach()
    wanted = functional.cross_entropy(logits.flatten(0, 1), samples["labels"].flatten())
    assert records(folder, "corrected")[0]["cross_entropy"] == pytest.approx(float(wanted), rel=1e-5)


def test_one_flipped_bit_in_a_model_is_refused_before_any_rank_starts(run, capsys):
    folder, make, _ = run
    damaged = shutil.copytree(folder / "teacher.nemo", folder / "damaged.nemo")
    (shard,) = (damaged / "model_weights").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    make("evaluate", f"evaluate.checkpoint={damaged}", f"evaluate.reference={folder}/teacher.nemo", code=2)
    assert "damaged" in capsys.readouterr().err
    assert not (folder / "eval" / "damaged.json").exists()
