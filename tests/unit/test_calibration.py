import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data.blend import Blend
from minitron_nemo.data.calibration import calibration_set, tokens_fingerprint
from minitron_nemo.data.datasets import batch, build_datasets
from minitron_nemo.data.prepare import prepare_corpus
from minitron_nemo.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tokenizer = train_tokenizer(["one two three four"], vocab_size=262, output=root / "tokenizer")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(["one", "two", "three", "four"], size=30)) for _ in range(40)]
    (root / "web.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = CorpusConfig(input=str(root / "web.jsonl"))
    prepare_corpus("web", corpus, tokenizer=tokenizer, output=root / "data", show_progress=False)
    return Blend(
        {"web": 1.0}, prepared=root / "data", cache=root / "cache", seq_length=16, split="90,10,0", seed=1,
        tokenizer=tokenizer, vocab_size=262,
    )  # fmt: skip


def test_the_calibration_set_is_fixed_token_for_token(blend, tmp_path):
    first = calibration_set(blend, num_samples=24)
    again = calibration_set(replace(blend, cache=tmp_path), num_samples=24)
    assert first.tokens.shape == (24, 16)
    assert first.tokens.dtype == torch.int64
    assert torch.equal(first.tokens, again.tokens)
    assert first.fingerprint == again.fingerprint


def test_another_seed_gives_other_samples(blend):
    sets = [calibration_set(replace(blend, seed=seed), num_samples=24) for seed in (1, 2)]
    assert sets[0].fingerprint != sets[1].fingerprint


def test_calibration_does_not_begin_as_training_with_the_same_seed(blend):
    train, _ = build_datasets(blend, num_train=24, num_valid=0)
    assert not torch.equal(batch(train, range(24))["tokens"], calibration_set(blend, num_samples=24).tokens)


def test_the_documents_of_a_sample_are_numbered_where_they_are_kept_apart(blend):
    """An end token belongs to the document that it ends; the next token begins another."""
    apart, together = (
        calibration_set(replace(blend, reset_attention_mask=apart), num_samples=24) for apart in (True, False)
    )
    assert torch.equal(apart.tokens, together.tokens)
    assert together.documents is None
    for tokens, documents in zip(apart.tokens.tolist(), apart.documents.tolist(), strict=True):
        assert documents == [tokens[:place].count(blend.tokenizer.eod) for place in range(16)]
    assert apart.documents.max() >= 1, "no sample has two documents: nothing was tested"
    two = apart.batch(3, 2, device=torch.device("cpu"))
    assert torch.equal(two["documents"], apart.documents[3:5])
    assert "documents" not in together.batch(3, 2, device=torch.device("cpu"))


def test_the_fingerprint_sees_every_token_and_the_shape_but_not_the_type():
    tokens = torch.arange(12).reshape(3, 4)
    changed = tokens.clone()
    changed[2, 3] += 1
    assert tokens_fingerprint(tokens) == tokens_fingerprint(tokens.to(torch.int32))
    assert tokens_fingerprint(tokens) != tokens_fingerprint(changed)
    assert tokens_fingerprint(tokens) != tokens_fingerprint(tokens.reshape(4, 3))
