import json

import numpy as np
import pytest
import torch

from minitron_nemo.config import CorpusConfig, DataConfig
from minitron_nemo.data.blend import batch, build_datasets
from minitron_nemo.data.calibration import calibration_set, tokens_fingerprint
from minitron_nemo.data.prepare import prepare_corpus
from minitron_nemo.data.tokenizer import train_tokenizer

DATA = DataConfig(blend={"web": 1.0}, seq_length=16, split="90,10,0")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tokenizer = train_tokenizer(["one two three four"], vocab_size=262, output=root / "tokenizer")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["one", "two", "three", "four"], size=30)) for _ in range(40)]
    (root / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = CorpusConfig(input=str(root / "web.jsonl"))
    prepare_corpus("web", corpus, tokenizer=tokenizer, output=root / "data", show_progress=False)
    return {"prepared": root / "data", "cache": root / "cache", "tokenizer": tokenizer, "vocab_size": 262}


def test_the_calibration_set_is_fixed_token_for_token(arguments, tmp_path):
    first = calibration_set(DATA, num_samples=24, seed=1, **arguments)
    again = calibration_set(DATA, num_samples=24, seed=1, **{**arguments, "cache": tmp_path})
    assert first.tokens.shape == (24, 16)
    assert first.tokens.dtype == torch.int64
    assert torch.equal(first.tokens, again.tokens)
    assert first.fingerprint == again.fingerprint


def test_another_seed_gives_other_samples(arguments):
    sets = [calibration_set(DATA, num_samples=24, seed=seed, **arguments) for seed in (1, 2)]
    assert sets[0].fingerprint != sets[1].fingerprint


def test_calibration_does_not_begin_as_training_with_the_same_seed(arguments):
    train, _ = build_datasets(DATA, num_train=24, num_valid=0, seed=1, **arguments)
    assert not torch.equal(
        batch(train, range(24))["tokens"], calibration_set(DATA, num_samples=24, seed=1, **arguments).tokens
    )


def test_the_fingerprint_sees_every_token_and_the_shape_but_not_the_type():
    tokens = torch.arange(12).reshape(3, 4)
    changed = tokens.clone()
    changed[2, 3] += 1
    assert tokens_fingerprint(tokens) == tokens_fingerprint(tokens.to(torch.int32))
    assert tokens_fingerprint(tokens) != tokens_fingerprint(changed)
    assert tokens_fingerprint(tokens) != tokens_fingerprint(tokens.reshape(4, 3))
