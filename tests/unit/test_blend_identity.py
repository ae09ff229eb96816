"""What a step reads is known by its content: another text under the same name is another identity."""

import json
from dataclasses import replace

from hf_models import save_tiny_tokenizer

from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data.blend import Blend
from minitron_nemo.data.prepare import prepare_corpus
from minitron_nemo.data.tokenizer import load_tokenizer


def prepared(folder, tokenizer, texts):
    folder.mkdir()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = CorpusConfig(input=str(folder / "text.jsonl"))
    prepare_corpus("text", corpus, tokenizer=tokenizer, output=folder / "data", show_progress=False)
    return folder / "data"


def test_the_identity_of_a_blend_is_of_its_content_and_not_of_its_place(tmp_path):
    tokenizer = load_tokenizer(save_tiny_tokenizer(tmp_path / "tokenizer"))
    texts = [f"w{n} w{n + 1} w{n + 2}" for n in range(20)]
    first, copy, other = (
        prepared(tmp_path / name, tokenizer, content)
        for name, content in (("first", texts), ("copy", texts[::-1]), ("other", [*texts[:-1], "w99 w98 w97"]))
    )
    blend = Blend(
        {"text": 1.0}, prepared=first, cache=tmp_path / "index", seq_length=4, split="80,20,0", seed=1,
        tokenizer=tokenizer, vocab_size=131,
    )  # fmt: skip
    assert replace(blend, prepared=copy, cache=tmp_path).identity() == blend.identity()
    assert replace(blend, prepared=other).identity() != blend.identity()
    changes = ({"weights": {"text": 2.0}}, {"seq_length": 5}, {"seed": 2}, {"split": "70,30,0"})
    assert all(replace(blend, **change).identity() != blend.identity() for change in changes)
