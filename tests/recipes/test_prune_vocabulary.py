"""A vocabulary pruned by the recipes: by what the data hold, with rows, tokenizer and data that fit each other."""

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_run import write_tiny_run
from torch.nn import functional

from minitron_nemo.checkpoint.formats.nemo import open_nemo
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


def test_distillation_from_the_larger_vocabulary_is_refused_in_one_line_that_says_what_to_do(run, capsys):
    run.make(
        "distill", f"distill.checkpoint={run.folder}/fewer.nemo", f"distill.teacher={run.folder}/whole.nemo", code=2
    )
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    assert "has a vocabulary of 275" in said
    assert "cut the teacher to the same words (prune.target.vocab_size alone)" in said


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
