"""Documents end with the tokenizer's own end token, whatever its id: read off the prepared files as bytes."""

import json

import numpy as np
import pytest
from hf_models import save_tiny_tokenizer

from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data.prepare import prepare_corpus
from minitron_nemo.data.tokenizer import load_tokenizer

TEXTS = ["w0 w1 w2", "w3", "w4 w5 w6 w7", "w0 w9"]


@pytest.mark.parametrize("token", ["</s>", "w50", "w127"])
def test_every_document_ends_with_the_tokenizers_end_token(token, tmp_path):
    folder = save_tiny_tokenizer(tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": token}))
    end = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"][token]
    assert end > 0
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    facts = prepare_corpus(
        "text", CorpusConfig(input=str(tmp_path / "text.jsonl")), tokenizer=load_tokenizer(folder),
        output=tmp_path / "data", show_progress=False,
    )  # fmt: skip
    written = np.fromfile(tmp_path / "data" / "text.bin", dtype=facts.dtype)
    (ends,) = np.nonzero(written == end)
    assert len(ends) == len(TEXTS)
    assert ends[-1] == len(written) - 1
    assert 0 not in written, "no unknown token, which has the id 0 here"
    assert sorted(np.diff([-1, *ends]) - 1) == sorted(len(text.split()) for text in TEXTS)
