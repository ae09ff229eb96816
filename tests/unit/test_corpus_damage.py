"""A damaged corpus is refused before a model reads it, in one line that names the file."""

import dataclasses
import json
import os

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data import verified
from minitron_nemo.data.blend import Blend
from minitron_nemo.data.corpus_facts import read_facts
from minitron_nemo.data.corpus_index import HEADER
from minitron_nemo.data.datasets import batch, build_datasets
from minitron_nemo.data.prepare import prepare_corpus
from minitron_nemo.data.tokenizer import train_tokenizer
from minitron_nemo.errors import UserError

DOCUMENTS = 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["one two three"], vocab_size=265, output=tmp_path_factory.mktemp("t"))


@pytest.fixture
def blend(tokenizer, tmp_path):
    """A blend of one freshly prepared corpus, `web`."""
    source = tmp_path / "web.jsonl"
    source.write_text("".join(json.dumps({"text": f"one two {i} " * 9}) + "\n" for i in range(DOCUMENTS)))
    corpus = CorpusConfig(input=str(source))
    prepare_corpus("web", corpus, tokenizer=tokenizer, output=tmp_path / "data", show_progress=False)
    return Blend(
        {"web": 1.0}, prepared=tmp_path / "data", cache=tmp_path / "cache", seq_length=16, split="100,0,0", seed=1,
        tokenizer=tokenizer, vocab_size=265,
    )  # fmt: skip


def refusal(blend):
    with pytest.raises(UserError) as caught:
        blend.check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path, *, offset, dtype, value):
    raw = bytearray(path.read_bytes())
    raw[offset : offset + np.dtype(dtype).itemsize] = np.array([value], dtype=dtype).tobytes()
    path.write_bytes(raw)


def set_high_bits(path):
    ids = np.fromfile(path, dtype=np.uint16)
    (ids | 0x8000).tofile(path)


def forget_hashes(prefix):
    """The pair as somebody else's: no facts say what its hash was."""
    prefix.with_name(f"{prefix.name}.json").unlink()


def foreign(folder, ids, *, dtype=np.uint16):
    builder = IndexedDatasetBuilder(str(folder / "foreign.bin"), dtype=dtype)
    builder.add_document(np.asarray(ids, dtype=dtype), [len(ids)])
    builder.finalize(str(folder / "foreign.idx"))
    return {str(folder / "foreign"): 1.0}


@pytest.mark.parametrize("bit", [0, 15])
def test_one_bit_of_the_tokens_is_noticed(blend, bit):
    path = blend.prepared / "web.bin"
    raw = np.fromfile(path, dtype=np.uint16)
    raw[len(raw) // 2] ^= 1 << bit
    raw.tofile(path)
    assert "web.bin: damaged: its SHA-256" in refusal(blend)


def test_every_high_bit_set_is_noticed_also_without_facts(blend):
    set_high_bits(blend.prepared / "web.bin")
    assert "web.bin: damaged" in refusal(blend)
    forget_hashes(blend.prepared / "web")
    assert "the model has ids 0..264" in refusal(blend)


def test_files_are_hashed_once_and_again_when_they_change(blend, monkeypatch):
    hashed = []
    real = verified.file_sha256
    monkeypatch.setattr(verified, "file_sha256", lambda *a, **k: (hashed.append(1), real(*a, **k))[1])
    facts = read_facts(blend.prepared / "web.json")
    files = {blend.prepared / f"web.{suffix}": sha for suffix, sha in facts.sha256.items()}

    def hashes_of_a_check():
        hashed.clear()
        verified.verify_once(files, cache=blend.cache, remedy="")
        return len(hashed)

    assert [hashes_of_a_check() for _ in range(3)] == [2, 0, 0]
    os.utime(blend.prepared / "web.bin", ns=(1, 1))
    assert [hashes_of_a_check() for _ in range(2)] == [1, 0]
    for damage in ("{", "[]", '{"a": 1}'):
        (blend.cache / verified.CACHE_FILE).write_text(damage)
        assert [hashes_of_a_check() for _ in range(2)] == [2, 0]


def test_a_rank_that_does_not_speak_reads_no_content(blend, monkeypatch):
    monkeypatch.setattr("minitron_nemo.data.corpus_files.verify_once", pytest.fail)
    dataclasses.replace(blend, verify=False).check()


def test_hashes_need_no_place_to_be_kept(blend, tmp_path):
    (tmp_path / "file").write_text("")
    dataclasses.replace(blend, cache=tmp_path / "file" / "cache").check()


LENGTHS, POINTERS, BEGINS = HEADER.size, HEADER.size + 4 * DOCUMENTS, HEADER.size + 12 * DOCUMENTS


@pytest.mark.parametrize(
    ("offset", "dtype", "value", "says"),
    [
        (POINTERS + 8 * 3, "<i8", 0, "sequence 3 begins at byte 0 of the .bin"),
        (POINTERS, "<i8", -64, "sequence 0 begins at byte -64"),
        (POINTERS + 8 * 39, "<i8", 2**60, f"sequence 39 begins at byte {2**60}"),
        (LENGTHS + 4 * 5, "<i4", -3, "web."),
        (LENGTHS, "<i4", 2**31 - 1, "expected by its .idx"),
        (BEGINS + 8 * 2, "<i8", 2**60, f"document 2 begins at sequence {2**60}"),
        (BEGINS + 8 * 2, "<i8", -1, "document 2 begins at sequence -1"),
        (18, "<u8", 2**60, "expected by its header"),
        (26, "<u8", 2**63, "expected by its header"),
        (18, "<u8", DOCUMENTS - 1, "expected by its header"),
        (17, "<u1", 7, "bad header"),
    ],
)
@pytest.mark.parametrize("with_facts", [True, False])
def test_a_damaged_index_is_refused_naming_the_file(blend, offset, dtype, value, says, with_facts):
    change(blend.prepared / "web.idx", offset=offset, dtype=dtype, value=value)
    if not with_facts:
        forget_hashes(blend.prepared / "web")
    found = refusal(blend)
    assert says in found
    assert str(blend.prepared / "web.") in found


def test_lengths_that_add_up_are_refused_when_one_is_not_positive(blend):
    """A pair of changes that leaves every sum as it was."""
    idx = blend.prepared / "web.idx"
    lengths = np.fromfile(idx, dtype="<i4", count=2, offset=LENGTHS)
    change(idx, offset=LENGTHS, dtype="<i4", value=lengths.sum() + 5)
    change(idx, offset=LENGTHS + 4, dtype="<i4", value=-5)
    assert "web.idx: damaged: sequence 1 has -5 tokens" in refusal(blend)


@pytest.mark.parametrize("blocks", [1, 7, DOCUMENTS])
def test_a_whole_index_passes_by_blocks_of_any_size(blend, monkeypatch, blocks):
    monkeypatch.setattr("minitron_nemo.data.corpus_index.BLOCK", blocks)
    blend.check()
    change(blend.prepared / "web.idx", offset=POINTERS + 8 * 20, dtype="<i8", value=0)
    assert "sequence 20" in refusal(blend)


@pytest.mark.parametrize(("dtype", "wrong"), [(np.uint16, 265), (np.int32, 2**30), (np.int32, -1)])
@pytest.mark.parametrize("blended", [False, True])
def test_an_id_outside_the_vocabulary_is_refused_where_a_batch_is_made(
    blend, tmp_path, dtype, wrong, blended, monkeypatch
):
    ids = np.ones(600, dtype=dtype)
    ids[300] = wrong
    weights = foreign(tmp_path, ids, dtype=dtype) | ({"web": 1.0} if blended else {})
    monkeypatch.setattr("minitron_nemo.data.corpus_files._scan", lambda *_, **__: None)  # it looks at the ends alone
    train, _ = build_datasets(dataclasses.replace(blend, weights=weights), num_train=80, num_valid=0)
    with pytest.raises(UserError, match=rf"foreign\.bin: sample \d+ holds the id {wrong}, the model has ids 0\.\.264"):
        batch(train, range(80))


def test_an_id_that_only_the_model_has_is_allowed(blend, tmp_path):
    """A vocabulary may be larger than the tokenizer's: padded by its maker."""
    weights = foreign(tmp_path, [270] * 100)
    train, _ = build_datasets(dataclasses.replace(blend, weights=weights, vocab_size=271), num_train=2, num_valid=0)
    assert (batch(train, range(2))["tokens"] == 270).all()


@pytest.mark.parametrize(
    "changes",
    [{"sha256": "00"}, {"sha256": {"bin": "00"}}, {"sha256": {"../x": "00", "idx": "0"}}, {"tokens": "many"},
     {"tokenizer": 3}, {"tokens": True}],
)  # fmt: skip
def test_facts_of_wrong_types_are_refused(blend, changes):
    path = blend.prepared / "web.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert "web.json: not the facts of a prepared corpus" in refusal(blend)


def test_facts_nested_without_end_are_refused(blend):
    (blend.prepared / "web.json").write_text("[" * 100_000)
    assert "not the facts of a prepared corpus" in refusal(blend)
