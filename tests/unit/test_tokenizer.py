import json
import random
import shutil
import subprocess
import sys

import pytest
from hf_models import save_templated_tokenizer

from minitron_nemo.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer
from minitron_nemo.errors import UserError

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "pruning and distillation " * 20,
    "na\u00efve \u591a\u8bed\u8a00 \U0001f642",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(TEXTS, vocab_size=300, output=output)
    return output


def rewrite(folder, name, values):
    (folder / name).write_text(json.dumps(values))


@pytest.fixture
def copy(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_decoding_what_was_encoded_gives_the_text_back(folder):
    tokenizer = load_tokenizer(folder)
    rng = random.Random(0)
    code_points = [*range(1, 0xD800), *range(0xE000, 0x20000)]
    texts = ["".join(map(chr, rng.choices(code_points, k=50))) for _ in range(200)]
    for text in [*TEXTS, *texts, "", "  two  spaces\r\n\ttab \x00"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_its_texts_one_by_one(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_the_vocabulary_has_exactly_the_size_asked_for(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 300
    assert max(max(tokenizer.encode(text)) for text in TEXTS) < 300
    assert tokenizer.eod == 0


def test_the_same_texts_give_the_same_bytes_in_another_process(folder, tmp_path):
    script = (
        "import sys; from pathlib import Path; from minitron_nemo.data.tokenizer import train_tokenizer;"
        f"train_tokenizer({TEXTS!r}, vocab_size=300, output=Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_auto_tokenizer_opens_a_trained_tokenizer_and_agrees(folder):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == (END_OF_TEXT, ours.eod, ours.vocab_size)


def test_too_few_texts_for_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(UserError, match="vocab_size=5000: the corpus yields only"):
        train_tokenizer(["short"], vocab_size=5000, output=tmp_path)
    with pytest.raises(UserError, match="vocab_size=256: a byte-level vocabulary needs 257"):
        train_tokenizer(TEXTS, vocab_size=256, output=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_nemo_folder_lends_its_tokenizer(folder, tmp_path):
    nemo = tmp_path / "teacher.nemo"
    nemo.mkdir()
    (nemo / "tokenizer").symlink_to(folder)
    with pytest.raises(UserError, match="no tokenizer.json"):  # what lies elsewhere is no part of a model
        load_tokenizer(nemo)
    (nemo / "tokenizer").unlink()
    shutil.copytree(folder, nemo / "tokenizer")
    assert load_tokenizer(nemo).fingerprint == load_tokenizer(folder).fingerprint


def test_truncation_left_in_the_file_neither_cuts_documents_nor_changes_the_fingerprint(folder, copy):
    content = json.loads((copy / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    rewrite(copy, "tokenizer.json", content)
    assert load_tokenizer(copy).encode(TEXTS[0]) == load_tokenizer(folder).encode(TEXTS[0])
    assert load_tokenizer(copy).fingerprint == load_tokenizer(folder).fingerprint


def test_the_fingerprint_changes_with_merges_and_with_eod(folder, copy):
    original = load_tokenizer(folder).fingerprint
    rewrite(copy, "tokenizer_config.json", {"eos_token": "A"})
    assert load_tokenizer(copy).fingerprint != original
    rewrite(copy, "tokenizer_config.json", {"eos_token": END_OF_TEXT})
    assert load_tokenizer(copy).fingerprint == original
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    rewrite(copy, "tokenizer.json", content)
    assert load_tokenizer(copy).fingerprint != original


def test_eod_comes_from_the_tokenizer_config_then_from_the_model_config(copy):
    rewrite(copy, "config.json", {"eos_token_id": [7, 8]})
    rewrite(copy, "tokenizer_config.json", {"eos_token": {"content": "B", "lstrip": False}})
    assert load_tokenizer(copy).eod == load_tokenizer(copy).backend.token_to_id("B")
    rewrite(copy, "tokenizer_config.json", {})
    assert load_tokenizer(copy).eod == 7
    rewrite(copy, "generation_config.json", {"eos_token_id": 9})
    assert load_tokenizer(copy).eod == 9
    (copy / "config.json").unlink()
    (copy / "generation_config.json").unlink()
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer(copy)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.model": "x"}, "convert it to tokenizer.json"),
        ({"tokenizer.json": "{"}, "not JSON"),
        ({"tokenizer.json": "[]"}, "expected a JSON object"),
        ({"tokenizer.json": "{}"}, "cannot open it"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused_in_one_line(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


HOSTILE = [3, 1.5, True, ["</s>"], [], {"content": 7}, {"content": "\ud800"}, "\ud800", "<|nowhere|>", "x" * 100_000]


@pytest.mark.parametrize("token", HOSTILE, ids=lambda token: ascii(token)[:20])
def test_an_eos_token_that_is_none_is_refused_in_one_line(copy, token):
    rewrite(copy, "tokenizer_config.json", {"eos_token": token})
    with pytest.raises(
        UserError, match="tokenizer_config.json: (eos_token|not JSON: .* half of a surrogate)"
    ) as caught:
        load_tokenizer(copy)
    message = str(caught.value)
    assert message.isascii()
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("ident", [-1, 300, 10**6, 10**30, True, 1.0, "0", {}, [], [True], [[0]], [-1, 0]], ids=str)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json", "hf_config.json"])
def test_an_eos_token_id_outside_the_vocabulary_is_refused_in_one_line(copy, ident, name):
    rewrite(copy, "tokenizer_config.json", {})
    rewrite(copy, name, {"eos_token_id": ident})
    with pytest.raises(UserError, match=rf"{name}: eos_token_id=.*0\.\.299") as caught:
        load_tokenizer(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 2**40])
def test_a_vocabulary_of_absurd_size_is_refused(copy, size):
    vocab = {} if size == 0 else {"a": size}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": vocab, "merges": []}}
    rewrite(copy, "tokenizer.json", tokenizer)
    with pytest.raises(UserError, match="vocabulary of 0|cannot open it") as caught:
        load_tokenizer(copy)
    assert "\n" not in str(caught.value)


def test_a_file_far_too_large_is_not_read(copy):
    with (copy / "tokenizer_config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="tokenizer_config.json: 1099511627776 bytes"):
        load_tokenizer(copy)


@pytest.mark.parametrize("template", ["llama3", "mistral"])
def test_what_begins_a_document_is_what_the_post_processor_puts_first(tmp_path, template):
    """`transformers` puts the same token there."""
    from transformers import AutoTokenizer

    folder = save_templated_tokenizer(tmp_path, template)
    tokenizer = load_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)("w0 w5")["input_ids"]
    assert theirs == [tokenizer.bos(), *tokenizer.encode("w0 w5")]
    assert tokenizer.backend.id_to_token(tokenizer.bos()) == "<s>"
    assert (tokenizer.bos(True), tokenizer.bos(False)) == (tokenizer.bos(), None)
    assert tokenizer.eod == 2


def test_a_tokenizer_without_post_processor_puts_nothing_first_unless_asked(folder, copy):
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos(), tokenizer.bos(False), tokenizer.bos(True)) == (None, None, 0)
    rewrite(copy, "tokenizer_config.json", {"eos_token": END_OF_TEXT})
    with pytest.raises(UserError, match="add_bos=true, and no begin-of-sequence token is known; set bos_token"):
        load_tokenizer(copy).bos(True)
    rewrite(copy, "config.json", {"bos_token_id": 5})
    assert load_tokenizer(copy).bos(True) == 5


def test_a_token_after_the_text_begins_nothing_and_two_before_it_must_be_decided(tmp_path):
    after = load_tokenizer(save_templated_tokenizer(tmp_path / "after", "$A </s>"))
    assert after.bos() is None
    both = load_tokenizer(save_templated_tokenizer(tmp_path / "both", "<s> $A </s>"))
    assert both.bos() == 1
    two = load_tokenizer(save_templated_tokenizer(tmp_path / "two", "<s> <unk> $A"))
    with pytest.raises(UserError, match=r"puts 2 tokens before a text, \[1, 0\]; say with prepare_data.add_bos"):
        two.bos()
    assert (two.bos(True), two.bos(False)) == (1, None)


def test_an_eos_token_outside_the_vocabulary_is_refused(copy):
    rewrite(copy, "tokenizer_config.json", {"eos_token": "<|nowhere|>"})
    with pytest.raises(UserError, match="<|nowhere|>.* not in the vocabulary"):
        load_tokenizer(copy)
