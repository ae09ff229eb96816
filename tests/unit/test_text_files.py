"""Every kind of file gives the same documents; what is not known to be text is named and not trained on."""

import gzip
import json
import logging

import pyarrow
import pytest
from pyarrow.parquet import write_table

from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data import shards, text_files
from minitron_nemo.data.corpora import read_documents
from minitron_nemo.data.prepare import prepare_corpus
from minitron_nemo.data.tokenizer import train_tokenizer
from minitron_nemo.errors import UserError

TEXTS = [f"document {i}\r\nwith na\u00efve \u591a words {'more ' * i}" for i in range(30)]


def lines(texts=TEXTS):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def array(texts=TEXTS):
    return json.dumps([{"id": i, "text": text} for i, text in enumerate(texts)], indent=2).encode()


def zstd(raw):
    half = len(raw) // 2  # two frames, as tools that work in parallel write them
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (raw[:half], raw[half:]))


def parquet(path, texts=TEXTS, *, large=False):
    column = pyarrow.array(texts, pyarrow.large_string() if large else pyarrow.string())
    write_table(pyarrow.table({"id": list(range(len(texts))), "text": column}), path, row_group_size=7)


def documents(path, **settings):
    return list(read_documents(CorpusConfig(input=str(path), **settings), name="web"))


def refusal(path, **settings):
    with pytest.raises(UserError) as caught:
        documents(path, **settings)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def packed(content):
    """The same bytes whenever they are made, as names of tests hold them."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines()),
        ("a.JSONL", lines()),
        ("a.ndjson", lines()),
        ("a.json", lines()),
        ("a.json", array()),
        ("a.json", b"\xef\xbb\xbf  \n" + array()),
        ("a.jsonl.gz", packed(lines())),
        ("a.json.gz", packed(lines())),
        ("a.json.gz", packed(array())),
        ("a.jsonl.gz", packed(lines(TEXTS[:9])) + packed(lines(TEXTS[9:]))),
    ],
)
def test_the_documents_are_the_same_however_they_are_kept(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert documents(tmp_path / name) == documents(tmp_path) == TEXTS


@pytest.mark.parametrize(("name", "make"), [("a.jsonl.zst", lines), ("a.json.zst", array)])
def test_zstandard_is_unpacked(tmp_path, name, make):
    (tmp_path / name).write_bytes(zstd(make()))
    assert documents(tmp_path) == TEXTS
    (tmp_path / name).write_bytes(zstd(make())[:-20])
    assert "cannot be read: Truncated compressed stream" in refusal(tmp_path / name)
    (tmp_path / name).write_bytes(b"nothing of the kind")
    assert "cannot be read" in refusal(tmp_path / name)


@pytest.mark.parametrize("large", [False, True])
def test_a_column_of_a_table_is_read(tmp_path, large):
    parquet(tmp_path / "a.parquet", [*TEXTS, None, ""], large=large)
    assert documents(tmp_path) == TEXTS
    assert "no column 'body', it has 'id', 'text'; set text_key" in refusal(tmp_path / "a.parquet", text_key="body")
    assert "column 'id' must hold strings, it holds int64" in refusal(tmp_path / "a.parquet", text_key="id")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing of the kind PAR1")
    assert "cannot be read" in refusal(tmp_path / "a.parquet")


def test_a_packed_plain_file_is_one_document(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(packed(TEXTS[0].encode()))
    assert documents(tmp_path) == TEXTS[:1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl.gz", packed(lines())[:-12], "cannot be read"),
        ("a.jsonl.gz", packed(lines())[:40] + b"\0" * 40, "cannot be read"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", packed(lines(TEXTS[:3]) + b"{\n"), "line 4: "),
        ("a.json", b"[1]", "entry 1: expected a JSON object, got int"),
        ("a.json", b'[{"text": "ok"}, {"body": "x"}]', "entry 2: no key 'text', it has 'body'"),
        ("a.json", b'[{"text": "ok"}', "not a JSON array"),
        ("a.json", b"[" * 100_000, "not a JSON array"),
        ("a.json", b'[{"text": "\xff"}]', "not a JSON array"),
        ("a.json", b'{\n "text": "pretty"\n}', "line 1: "),
        ("a.json", b'"text"', "line 1: expected a JSON object, got str"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    assert says in refusal(tmp_path / name)


@pytest.mark.parametrize(("name", "make"), [("a.jsonl.gz", lines), ("a.txt.gz", lines), ("a.json.gz", array)])
def test_a_packed_file_that_swells_without_end_is_refused(tmp_path, monkeypatch, name, make):
    (tmp_path / name).write_bytes(packed(make(["x" * 10_000])))
    monkeypatch.setattr(text_files, "DOCUMENT_LIMIT", 5000)
    assert "one document of more than 5000 bytes" in refusal(tmp_path / name)


@pytest.fixture
def mixed(tmp_path):
    """Text among files of other kinds."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.txt", "b.md", "c.py"):
        (folder / name).write_text(f"text of {name}")
    for name in ("x.csv", "y.csv", "z.pdf", "LICENSE", "w.csv.gz"):
        (folder / name).write_bytes(packed(b"1,2") if name.endswith("gz") else b"1,2")
    return folder


def test_unknown_suffixes_are_named_with_their_counts_and_not_trained_on(mixed, tmp_path, caplog):
    tokenizer = train_tokenizer(["some words"], vocab_size=260, output=tmp_path / "t")
    caplog.set_level(logging.INFO, logger="minitron_nemo")
    corpus = CorpusConfig(input=str(mixed))
    facts = prepare_corpus("web", corpus, tokenizer=tokenizer, output=tmp_path / "out", show_progress=False)
    assert facts.documents == 3
    named = [record.message for record in caplog.records if "not read" in record.message]
    assert len(named) == 1
    assert "web: not read: 1 without suffix, 3 .csv, 1 .pdf; a glob that names a suffix" in named[0]


@pytest.mark.parametrize(
    ("glob", "count"), [("**/*", 3), ("*", 3), ("**/*.*", 3), ("**/*.csv", 2), ("**/*.[cp]*", 5), ("**/L*", 0)]
)
def test_a_glob_that_names_a_suffix_is_consent(mixed, glob, count):
    if count == 0:
        with pytest.raises(UserError, match="has no files for glob .*not known as text: 1 without suffix"):
            documents(mixed, glob=glob)
    else:
        assert len(documents(mixed, glob=glob)) == count


def test_a_file_given_by_its_own_name_is_read_whatever_its_suffix(mixed):
    assert documents(mixed / "LICENSE") == documents(mixed / "x.csv") == ["1,2"]


def test_a_packed_file_is_one_piece_and_lines_are_divided(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["some words"], vocab_size=260, output=tmp_path / "t")
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    counts = {}
    for name, content in (
        ("a.jsonl", lines()), ("b.json", lines()), ("c.json", array()), ("d.jsonl.gz", packed(lines())),
    ):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(content)
        jobs = shards.plan_shards(
            [path], CorpusConfig(), tokenizer=tokenizer, bos=None, dtype="uint16", folder=tmp_path
        )  # fmt: skip
        counts[name] = len(jobs)
        skipped = shards.Skipped()
        texts = [t for job in jobs for span in job.spans for t in shards.read_span(span, job.corpus, skipped=skipped)]
        assert texts == TEXTS
    assert counts["a.jsonl"] == counts["b.json"] > 10
    assert counts["c.json"] == counts["d.jsonl.gz"] == 1
