"""A vocabulary of which some words are gone: every text decodes, what is left of it is encoded as before."""

import json
import random
import re
import shutil

import numpy as np
import pytest
from bpe import KINDS, SENTENCES, SPECIAL, save_bpe
from hf_models import save_tiny_tokenizer
from tokenizers import models

from minitron_nemo.data.prune_tokenizer import pruned_tokenizer
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.data.vocabulary import read_vocabulary
from minitron_nemo.errors import UserError

SIZE = 400
LETTERS = "thengirsoa ,.é京€\x00\n9"
TEXTS = [
    *SENTENCES, "", " ", "  the", "thethethe  there", "🙂 of 東京 then", "<s>the</s> <unk>", "\x00\x7f ￿",
    *("".join(random.Random(n).choices(LETTERS, k=30)) for n in range(150)),
    *(" ".join(random.Random(n).choices(" ".join(SENTENCES).split(), k=5)) for n in range(150)),
]  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(save_bpe(tmp_path_factory.mktemp("bpe") / request.param, request.param, size=SIZE))


def counted(tokenizer, texts=SENTENCES) -> list[int]:
    return np.bincount([i for text in texts for i in tokenizer.encode(text)], minlength=SIZE).tolist()


def kept_of(tokenizer, size: int, counts=None) -> list[int]:
    vocabulary = read_vocabulary(tokenizer.folder, size=SIZE)
    return sorted(vocabulary.ranked(counts or counted(tokenizer))[:size])


def pruned(tokenizer, kept, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in pruned_tokenizer(tokenizer.folder, kept).items():
        (folder / name).write_bytes(content)
    return load_tokenizer(folder)


@pytest.mark.parametrize("size", [300, 330, 385])
def test_every_text_decodes_as_before_and_kept_words_are_encoded_as_before(tokenizer, size, tmp_path):
    for seed in range(4):
        counts = [random.Random(100 * seed + i).randrange(9) for i in range(SIZE)]
        kept = kept_of(tokenizer, size, counts)
        smaller, new = pruned(tokenizer, kept, tmp_path / "smaller"), {old: i for i, old in enumerate(kept)}
        same, drawn = 0, random.Random(seed)
        of_kept = [tokenizer.decode(drawn.choices(kept, k=drawn.randrange(2, 9))) for _ in range(150)]
        for text in TEXTS + of_kept:
            ids = tokenizer.encode(text)
            assert smaller.decode(smaller.encode(text)) == tokenizer.decode(ids)
            if set(ids) <= new.keys():
                same += len(ids) > 1
                assert smaller.encode(text) == [new[i] for i in ids], text
        assert same > 10, "texts of kept words alone, or nothing was seen"
        assert any(not set(tokenizer.encode(text)) <= new.keys() for text in TEXTS)


def test_parts_are_what_the_library_makes_of_a_word_that_it_does_not_have(tokenizer):
    """Without a word and its merges, the library ends at the two parts that its last merge would have joined."""
    vocabulary = read_vocabulary(tokenizer.folder, size=SIZE)
    vocab = {word: ident for ident, word in vocabulary.words.items()}
    for ident, parts in list(vocabulary.parts.items())[::2]:
        word = vocabulary.words[ident]
        merges = [pair for pair in vocabulary.merges if word != "".join(pair) and word not in pair]
        without = models.BPE({other: i for other, i in vocab.items() if other != word}, merges)
        assert [token.id for token in without.tokenize(word)] == list(parts), word


def test_every_beginning_of_the_ranking_is_closed_and_has_what_must_stay(tokenizer):
    vocabulary = read_vocabulary(tokenizer.folder, size=SIZE)
    order = vocabulary.ranked(counted(tokenizer))
    assert sorted(order) == list(range(SIZE))
    least = len(vocabulary.closed_needs)
    for size in range(least, SIZE + 1, 7):
        vocabulary.check_kept(order[:size], name="plan")
    assert set(order[:least]) == vocabulary.closed_needs
    vocabulary.check_size(least)
    with pytest.raises(UserError, match=f"vocab_size={least - 1}: special tokens, bytes .* need {least}"):
        vocabulary.check_size(least - 1)


def test_frequent_words_stay_and_of_equals_the_lower_id(tokenizer):
    vocabulary = read_vocabulary(tokenizer.folder, size=SIZE)
    free = [i for i in vocabulary.words if i not in vocabulary.closed_needs]
    frequent = max(free, key=lambda i: (len(vocabulary.words[i]), i))
    counts = [0.0] * SIZE
    counts[frequent] = 1.0
    order = vocabulary.ranked(counts)
    least = len(vocabulary.closed_needs)
    needs = {frequent} | {part for i in (frequent,) for part in ancestors(vocabulary, i)} - vocabulary.closed_needs
    assert set(order[least : least + len(needs)]) == needs, "it and what it is merged from, then all others"
    equal = vocabulary.ranked([1.0] * SIZE)
    bases = [i for i in free if i not in vocabulary.parts]
    assert [i for i in equal if i in bases] == sorted(bases)
    position = {ident: place for place, ident in enumerate(equal)}
    ready_first = [i for i in free if all(part in vocabulary.closed_needs for part in vocabulary.parts.get(i, ()))]
    assert [i for i in equal if i in ready_first] == sorted(ready_first)
    assert all(position[part] < position[i] for i, parts in vocabulary.parts.items() for part in parts)


def ancestors(vocabulary, ident):
    for part in vocabulary.parts.get(ident, ()):
        yield part
        yield from ancestors(vocabulary, part)


def test_special_tokens_and_bytes_keep_their_meaning(tokenizer, tmp_path):
    kept = kept_of(tokenizer, 310)
    smaller = pruned(tokenizer, kept, tmp_path / "smaller")
    new = {old: i for i, old in enumerate(kept)}
    for name, token in SPECIAL.items():
        before, after = (t.backend.token_to_id(token) for t in (tokenizer, smaller))
        assert after == new[before]
        generation = json.loads((smaller.folder / "generation_config.json").read_text())
        if name == "bos_token":
            assert generation["bos_token_id"] == after
            assert smaller.bos() == after == new[tokenizer.bos()], "the post-processor's own id"
        if name == "eos_token":
            assert generation["eos_token_id"][0] == smaller.eod == after
        if name == "unk_token":
            dropped = SIZE - 10 not in kept
            assert generation["suppress_tokens"] == [after, *([] if dropped else [new[SIZE - 10]])]
        decoder = json.loads((smaller.folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        assert decoder[str(after)] == {"content": token}
    assert smaller.encode("<s></s>") == [new[i] for i in tokenizer.encode("<s></s>")]
    assert smaller.vocab_size == 310


def test_transformers_reads_the_pruned_tokenizer_and_agrees(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    smaller = pruned(tokenizer, kept_of(tokenizer, 320), tmp_path / "smaller")
    theirs = AutoTokenizer.from_pretrained(smaller.folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (smaller.bos(), smaller.eod)
    for text in TEXTS[:40]:
        assert theirs(text).input_ids == [smaller.bos(), *smaller.encode(text)]


def test_all_words_kept_are_the_same_tokenizer(tokenizer, tmp_path):
    assert pruned(tokenizer, range(SIZE), tmp_path / "same").fingerprint == tokenizer.fingerprint


def test_kept_words_without_what_they_need_are_refused_by_name(tokenizer):
    vocabulary = read_vocabulary(tokenizer.folder, size=SIZE)
    bos = tokenizer.bos()
    for gone, reason in ((bos, "a special or added token"), (min(vocabulary.needed, key=lambda i: i == bos), "")):
        with pytest.raises(UserError, match=re.escape(f"plan.json: drops id {gone} (") + f".*{reason}"):
            vocabulary.check_kept(set(range(SIZE)) - {gone}, name="plan.json")
    ident, part = next((i, p) for i, parts in vocabulary.parts.items() for p in parts if p not in vocabulary.needed)
    with pytest.raises(UserError, match=rf"plan.json: keeps id .* and drops {part} .* which it is merged from"):
        vocabulary.check_kept(set(range(SIZE)) - {part}, name="plan.json")
    assert ident in vocabulary.words


def damaged(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "damaged")
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "damaged" / "tokenizer.json").write_text(json.dumps(content))
    return tmp_path / "damaged"


REFUSED = {
    "unigram": (lambda c: c["model"].update(type="Unigram"), "vocabulary of type Unigram: only byte-level"),
    "random": (lambda c: c["model"].update(dropout=0.1), "dropout=0.1: a BPE with it cannot be pruned"),
    "suffix": (lambda c: c["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix='</w>'"),
    "no bytes": (lambda c: (c["model"].update(byte_fallback=False), c.update(pre_tokenizer=None, decoder=None)),
                 "neither byte-level nor with byte fallback"),
    "unknown part": (lambda c: c["model"]["merges"].append(["the", "quux"]), "a merge names"),
    "no pair": (lambda c: c["model"]["merges"].append("the"), "a merge is no pair: 'the'"),
    "large id": (lambda c: c["model"]["vocab"].update(quux=SIZE), f"has the id {SIZE}, the model has ids 0..399"),
    "id twice": (lambda c: c["model"]["vocab"].update(quux=7), "share the id 7"),
    "id of text": (lambda c: c["model"]["vocab"].update(quux="7"), "has the id '7'"),
    "no vocab": (lambda c: c["model"].update(vocab=[]), "needs a mapping `vocab`"),
    "added": (lambda c: c["added_tokens"].append(3), "added_tokens must be objects"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_vocabulary_that_cannot_be_pruned_is_refused_in_one_line(kind, tokenizer, tmp_path):
    change, message = REFUSED[kind]
    folder = damaged(tokenizer.folder, tmp_path, change)
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        read_vocabulary(folder, size=SIZE)
    assert "\n" not in str(refused.value)


def test_word_level_vocabularies_are_refused(tmp_path):
    with pytest.raises(UserError, match="a vocabulary of type WordLevel: only byte-level and byte-fallback BPE"):
        read_vocabulary(save_tiny_tokenizer(tmp_path), size=131)


def test_ids_that_the_library_would_not_give_are_refused(tmp_path):
    """Where ids have holes the library counts added tokens from the number of words, not from the largest id."""
    folder = save_bpe(tmp_path / "bpe", "byte_level", size=SIZE)
    holes = damaged(folder, tmp_path, lambda c: c["model"]["vocab"].pop("".join(c["model"]["merges"].pop())))
    with pytest.raises(UserError, match="has the id .* in the file and .* in the tokenizers library"):
        pruned_tokenizer(holes, range(SIZE))
