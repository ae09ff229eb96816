"""A vocabulary pruned by the recipes: by what the data hold, with rows, tokenizer and data that fit each other."""

import importlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import write_tiny_run
from torch.nn import functional

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.cli import run_command
from minitron_nemo.config.compose import compose
from minitron_nemo.data.corpus_index import open_index
from minitron_nemo.data.datasets import batch, build_datasets
from minitron_nemo.data.token_counts import token_frequencies, training_tokens
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.data.vocabulary import read_vocabulary
from minitron_nemo.pruning.plan import read_plan
from minitron_nemo.steps.settings import blend_for

ALONE = ["trainer.devices=1", "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
WORDS = 275
TARGET = f"prune.target={{hidden_size: null, ffn_hidden_size: null, vocab_size: {WORDS}}}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model of random weights, the same with fewer words, text prepared for either, and exports of both."""
    config_dir, folder = write_tiny_run(tmp_path_factory.mktemp("run"))
    arguments = ["--config-name", "tiny", "--config-dir", str(config_dir), *ALONE]

    def make(name, *overrides, code=0):
        recipe = importlib.import_module(f"recipes.{name}").RECIPE
        assert run_command(recipe, [*arguments, *overrides]) == code

    make("train_tokenizer")
    make("prepare_data")
    make("random_init", f"random_init.output={folder}/whole.nemo", "random_init.init_method_std=0.2")
    make("prune", TARGET, f"prune.checkpoint={folder}/whole.nemo", f"prune.output={folder}/fewer.nemo")
    for name in ("whole", "fewer"):
        make("export_hf", f"export_hf.checkpoint={folder}/{name}.nemo", f"export_hf.output={folder}/{name}_hf")
    return SimpleNamespace(folder=folder, make=make, config=compose("tiny", ALONE, config_dir=config_dir))


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_frequencies_are_those_of_the_training_documents_by_weight(run):
    blend = blend_for(run.config, open_nemo(run.folder / "whole.nemo"))
    wanted = np.zeros(300)
    for name, weight in (("first", 0.3), ("second", 0.7)):
        prefix = run.folder / "data" / name
        index = open_index(prefix)
        assert len(index.lengths) == 30
        tokens = np.fromfile(f"{prefix}.bin", dtype=index.dtype)[: index.lengths[:24].sum()]  # 80 of 100 documents
        assert training_tokens(prefix, "80,20,0") == len(tokens)
        for ident in tokens.tolist():
            wanted[ident] += weight / len(tokens)
    found = token_frequencies(blend)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert found.sum() == pytest.approx(1)
    kept = list((run.folder / "data_index").glob("token_counts_*.json"))
    assert len(kept) == 2, "of each corpus the counts are kept"
    for damage in (lambda content: content[:-5], lambda content: b"", lambda content: b"[-1]"):
        for cached in kept:
            cached.write_bytes(damage(cached.read_bytes()))
        np.testing.assert_array_equal(token_frequencies(blend), found)


def test_the_most_frequent_words_stay(run):
    whole = open_nemo(run.folder / "whole.nemo")
    plan = read_plan(run.folder / "fewer.nemo" / "plan.json")
    kept = set(plan.units("vocab_size"))
    assert len(kept) == WORDS
    vocabulary = read_vocabulary(whole.tokenizer, size=300)
    frequencies = token_frequencies(blend_for(run.config, whole))
    needs = {ident: {ident} for ident in sorted(vocabulary.words, key=lambda i: len(vocabulary.words[i]))}
    for ident, found in needs.items():
        for part in vocabulary.parts.get(ident, ()):
            found |= needs[part]
    dropped = max(frequencies[ident] for ident in range(300) if ident not in kept)
    free = kept - vocabulary.closed_needs
    assert free
    for ident in free:
        most = max(frequencies[whole] for whole, found in needs.items() if ident in found)
        assert most >= dropped, "frequent itself, or what a frequent word is merged from"


def test_logits_are_the_rows_of_the_whole_model(run):
    kept = list(read_plan(run.folder / "fewer.nemo" / "plan.json").units("vocab_size"))
    tokens = torch.randint(0, WORDS, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = loaded(run.folder / "whole_hf")(torch.tensor(kept)[tokens]).logits[..., kept]
        torch.testing.assert_close(loaded(run.folder / "fewer_hf")(tokens).logits, whole, rtol=0, atol=0)
    config = json.loads((run.folder / "fewer_hf" / "config.json").read_text())
    assert config["vocab_size"] == WORDS
    assert config["eos_token_id"] == load_tokenizer(run.folder / "fewer.nemo").eod


def test_it_is_evaluated_on_text_prepared_with_its_own_tokenizer(run, capsys):
    fewer = run.folder / "fewer.nemo"
    named = [f"evaluate.checkpoint={fewer}", f"evaluate.reference={fewer}", f"evaluate.output={run.folder}/eval.json"]
    run.make("evaluate", *named, code=2)
    assert "prepared with another tokenizer" in capsys.readouterr().err
    own = [f"prepare_data.tokenizer={fewer}", f"prepare_data.output={run.folder}/own_data"]
    run.make("prepare_data", *own)
    run.make("evaluate", *named, *own)
    config = run.config
    config.prepare_data.output = f"{run.folder}/own_data"
    _, held_out = build_datasets(blend_for(config, open_nemo(fewer)), num_train=0, num_valid=4)
    samples = batch(held_out, range(4))
    with torch.no_grad():
        logits = loaded(run.folder / "fewer_hf")(samples["tokens"]).logits
    wanted = functional.cross_entropy(logits.flatten(0, 1), samples["labels"].flatten())
    assert json.loads((run.folder / "eval.json").read_text())["cross_entropy"] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("tp", [1, 2])
def test_over_the_words_that_stay_the_whole_model_is_the_same_model(run, tp):
    """Only words are gone, so every distribution is that of the whole model among the words that are left."""
    fewer, output = run.folder / "fewer.nemo", run.folder / f"beside_whole_{tp}.json"
    own = [f"prepare_data.tokenizer={fewer}", f"prepare_data.output={run.folder}/own_data"]
    run.make("prepare_data", *own)
    layout = [f"trainer.devices={tp}", f"parallel.tensor_model_parallel_size={tp}"]
    run.make("evaluate", *own, *layout, f"evaluate.checkpoint={fewer}", f"evaluate.reference={run.folder}/whole.nemo",
             f"evaluate.output={output}")  # fmt: skip
    record = json.loads(output.read_text())
    assert record["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert record["top1_agreement"] == 1
    assert record["cross_entropy"] > 1


def test_a_student_with_fewer_words_learns_from_the_whole_teacher(run):
    fewer, student = run.folder / "fewer.nemo", run.folder / "student.nemo"
    own = [f"prepare_data.tokenizer={fewer}", f"prepare_data.output={run.folder}/own_data"]
    run.make("prepare_data", *own)
    settings = [
        "distill.cross_entropy_weight=0.5", "distill.training.max_steps=2", f"distill.output={student}",
        "distill.check_teacher=false",  # its weights are random
    ]  # fmt: skip
    run.make("distill", *own, *settings, f"distill.checkpoint={fewer}", f"distill.teacher={run.folder}/whole.nemo")
    log = run.folder / "logs" / "student" / "metrics.jsonl"
    first = json.loads(log.read_text().splitlines()[0])
    assert first["forward_kl"] == pytest.approx(0, abs=1e-6), "before its first step it is the teacher's cut"
    assert first["loss"] == pytest.approx(0.5 * first["cross_entropy"], rel=1e-5)
    assert open_nemo(student).arch.vocab_size == WORDS


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ("whole", "fewer", "has a vocabulary of 300"),
        ("foreign", "whole", "is no word of"),
        ("remerged", "whole", "is not what pruning it leaves"),
    ],
)
def test_a_vocabulary_that_is_not_the_teachers_is_refused_in_one_line(run, student, teacher, said, capsys):
    for name in ("foreign", "remerged"):
        if not (run.folder / f"{name}.nemo").exists():
            with_other_words(run.folder / "fewer.nemo", run.folder / f"{name}.nemo", remerged=name == "remerged")
    run.make("distill", f"distill.checkpoint={run.folder}/{student}.nemo",
             f"distill.teacher={run.folder}/{teacher}.nemo", code=2)  # fmt: skip
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1
    assert said in text


def with_other_words(source, target, *, remerged: bool) -> None:
    """A copy of a model whose tokenizer has a word of its own, or other merges of its words."""
    model, folder = open_nemo(source), target.parent / f"{target.name}_tokenizer"
    shutil.copytree(model.tokenizer.path, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    if remerged:
        values["model"]["merges"].reverse()
    else:
        last = max(values["model"]["vocab"], key=values["model"]["vocab"].__getitem__)
        values["model"]["merges"] = [m for m in values["model"]["merges"] if "".join(m) != last]
        values["model"]["vocab"]["zqzqzq"] = values["model"]["vocab"].pop(last)
    (folder / "tokenizer.json").write_text(json.dumps(values))
    write_nemo(target, model.arch, stream(model.weights), dtype=model.dtype, tokenizer=folder, origin=Origin("test"))


def test_a_size_without_room_for_what_must_stay_is_refused_and_nothing_is_left_behind(run, capsys):
    output = run.folder / "none.nemo"
    for overrides, said in (
        (
            ["prune.target.vocab_size=200"],
            "vocab_size=200: special tokens, bytes and what they are merged from need 257",
        ),
        (["prune.target.vocab_size=301"], "prune.target.vocab_size=301: pruning needs 1..300"),
        (["data.blend=null"], "data.blend"),
    ):
        run.make("prune", TARGET, f"prune.checkpoint={run.folder}/whole.nemo", f"prune.output={output}", *overrides,
                 code=2)  # fmt: skip
        assert said in capsys.readouterr().err
    assert not list(run.folder.glob("none.nemo*"))


def test_a_plan_that_drops_a_special_token_is_refused(run, capsys, tmp_path):
    values = json.loads((run.folder / "fewer.nemo" / "plan.json").read_text())
    gone = next(ident for ident in range(300) if ident not in values["keep"]["vocab_size"])
    values["keep"]["vocab_size"] = sorted({*values["keep"]["vocab_size"], gone} - {0})
    (tmp_path / "plan.json").write_text(json.dumps(values))
    run.make("prune", f"prune.plan={tmp_path}/plan.json", f"prune.checkpoint={run.folder}/whole.nemo",
             f"prune.output={tmp_path}/cut.nemo", code=2)  # fmt: skip
    assert "drops id 0 ('<|endoftext|>'), a special or added token; keep it" in capsys.readouterr().err
    assert not list(tmp_path.glob("cut.nemo*"))
