import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hf_models import save_templated_tokenizer, save_tiny_tokenizer
from killed import killed
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data import shards
from minitron_nemo.data.corpora import list_files, read_documents
from minitron_nemo.data.corpus_facts import read_facts
from minitron_nemo.data.corpus_index import dtype_for
from minitron_nemo.data.prepare import prepare_corpus
from minitron_nemo.data.tokenizer import load_tokenizer, train_tokenizer
from minitron_nemo.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["some words to merge, more words"], vocab_size=270, output=tmp_path_factory.mktemp("t"))


def make_texts(count, seed=0):
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma\n", "n\u00e9e"]
    return [f"{i}: " + " ".join(rng.choices(words, k=rng.randint(1, 30))) for i in range(count)]


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({"id": i, key: text}) + "\n" for i, text in enumerate(texts)))
    return path


def documents_of(prefix, tokenizer):
    """Decoded documents of a pair; every one must end with eod."""
    indexed = IndexedDataset(str(prefix))
    assert len(indexed.document_indices) - 1 == len(indexed)
    assert all(indexed[i][-1] == tokenizer.eod for i in range(len(indexed)))
    return [tokenizer.decode(indexed[i][:-1].tolist()) for i in range(len(indexed))]


def pair_of(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.fixture
def prepare(tokenizer, tmp_path):
    """Prepare a corpus into its own output folder; returns its facts and its prefix."""

    def run(corpus, *, output="out", **kwargs):
        facts = prepare_corpus(
            "web", corpus, tokenizer=tokenizer, output=tmp_path / output, show_progress=False, **kwargs
        )
        return facts, tmp_path / output / "web"

    return run


def test_every_document_comes_out_once_with_its_text_unchanged(prepare, tokenizer, tmp_path):
    texts = make_texts(50)
    facts, prefix = prepare(CorpusConfig(input=str(write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[:7], " \n"]))))
    found = documents_of(prefix, tokenizer)
    assert sorted(found) == sorted(texts)
    assert (facts.documents, facts.skipped.duplicates, facts.skipped.empty) == (50, 7, 1)
    assert facts.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert facts.text_bytes == sum(len(text.encode()) for text in texts)


def test_the_bytes_do_not_depend_on_files_workers_or_shards(prepare, tmp_path, monkeypatch):
    texts = make_texts(40)
    reference = prepare(CorpusConfig(input=str(write_jsonl(tmp_path / "a.jsonl", texts))), output="one")[1]
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(4):
        write_jsonl(folder / f"{i}.jsonl", texts[i::4])
    monkeypatch.setattr(shards, "SHARD_BYTES", 300)
    for workers in (1, 2):
        prefix = prepare(CorpusConfig(input=str(folder)), output=f"many{workers}", workers=workers)[1]
        assert pair_of(prefix) == pair_of(reference)
    assert not list((tmp_path / "many2").glob("*.shards*"))


@pytest.mark.parametrize("merge_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("vocab_size", [260, 65_600])
def test_the_pair_is_what_megatrons_own_writer_makes_of_the_documents(tmp_path, monkeypatch, merge_bytes, vocab_size):
    """In the order of the hash of the text, each of its ids and the end token."""
    tokenizer = load_tokenizer(save_tiny_tokenizer(tmp_path / "t", vocab_size=vocab_size))
    texts = [" ".join(f"w{(i * 977 + j) % (vocab_size - 3)}" for j in range(i % 7)) + f" w{i}" for i in range(40)]
    monkeypatch.setattr(shards, "SHARD_BYTES", 150)
    monkeypatch.setattr("minitron_nemo.data.prepare.MERGE_BYTES", merge_bytes)
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, *texts[:9]])
    prepare_corpus("web", CorpusConfig(input=str(path)), tokenizer=tokenizer, output=tmp_path, show_progress=False)
    dtype = DType.optimal_dtype(vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for text in sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest()):
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(np.array(ids, dtype=dtype), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert pair_of(tmp_path / "web") == pair_of(tmp_path / "theirs")
    facts = read_facts(tmp_path / "web.json")
    assert facts.sha256 == {s: hashlib.sha256((tmp_path / f"web.{s}").read_bytes()).hexdigest() for s in ("bin", "idx")}


@pytest.mark.parametrize("vocab_size", [1, 65_499, 65_500, 65_536, 2**31 - 1])
def test_the_dtype_of_tokens_is_megatrons(vocab_size):
    assert dtype_for(vocab_size) == np.dtype(DType.optimal_dtype(vocab_size))


@pytest.mark.parametrize(("hard", "merges"), [(1000, True), (200, False)])
def test_more_shards_than_files_may_be_open_are_merged_where_the_limit_can_be_raised(tokenizer, tmp_path, hard, merges):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    script = (
        "import resource, sys; from pathlib import Path; from minitron_nemo.config.schema import CorpusConfig\n"
        "from minitron_nemo.data import shards\nfrom minitron_nemo.data.prepare import prepare_corpus\n"
        "from minitron_nemo.data.tokenizer import load_tokenizer\n"
        f"shards.SHARD_BYTES, shards.MAX_SHARDS = 1, 250; resource.setrlimit(resource.RLIMIT_NOFILE, (100, {hard}))\n"
        f"prepare_corpus('web', CorpusConfig(input={str(path)!r}), tokenizer=load_tokenizer({str(tokenizer.folder)!r}),"
        f" output=Path({str(tmp_path / 'out')!r}), show_progress=False)"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode == 0) == merges, ended.stderr
    assert merges or "files and 200 are allowed here" in ended.stderr


@pytest.mark.parametrize("shard_bytes", [1, 7, 50, 64, 1000])
def test_every_line_belongs_to_exactly_one_span(prepare, tokenizer, tmp_path, monkeypatch, shard_bytes):
    texts = make_texts(12)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # the last line may lack its end
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    facts, prefix = prepare(CorpusConfig(input=str(path)))
    assert sorted(documents_of(prefix, tokenizer)) == sorted(texts)
    assert facts.skipped.duplicates == 0


def test_a_huge_corpus_has_larger_shards_not_more(tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(40))
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    monkeypatch.setattr(shards, "MAX_SHARDS", 5)
    jobs = shards.plan_shards([path], CorpusConfig(), tokenizer=tokenizer, bos=None, dtype="uint16", folder=tmp_path)
    assert 5 <= len(jobs) <= 6
    assert sum(job.num_bytes for job in jobs) == path.stat().st_size


def test_a_split_by_position_is_a_mix_of_the_whole_corpus(prepare, tokenizer, tmp_path):
    for part in ("early", "late"):
        (tmp_path / "in" / part).mkdir(parents=True)
        for i in range(100):
            (tmp_path / "in" / part / f"{i}.txt").write_text(f"{part} {i}")
    _, prefix = prepare(CorpusConfig(input=str(tmp_path / "in")))
    last_third = documents_of(prefix, tokenizer)[-66:]
    assert 20 < sum(text.startswith("early") for text in last_third) < 46


def test_a_second_call_takes_up_the_finished_shards(prepare, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    monkeypatch.setattr(shards, "SHARD_BYTES", 200)
    reference = prepare(CorpusConfig(input=str(path)), output="whole")[1]
    real, done = shards.write_shard, []

    def dies_after(count):
        def write(job):
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(job.key)
            return real(job)

        return write

    monkeypatch.setattr("minitron_nemo.data.prepare.write_shard", dies_after(3))
    with pytest.raises(KeyboardInterrupt):
        prepare(CorpusConfig(input=str(path)))
    assert not (tmp_path / "out" / "web.bin").exists()
    # A shard that lost its contents is made again.
    next((tmp_path / "out" / "web.shards").glob(f"{done[0]}.bin")).write_bytes(b"")
    first = done.copy()
    monkeypatch.setattr("minitron_nemo.data.prepare.write_shard", dies_after(-1))
    _, prefix = prepare(CorpusConfig(input=str(path)))
    assert pair_of(prefix) == pair_of(reference)
    assert [key for key in first if done.count(key) == 2] == first[:1]
    assert not (tmp_path / "out" / "web.shards").exists()


def test_finished_shards_may_wait_elsewhere_and_leave_nothing_behind(prepare, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(5))
    _, prefix = prepare(CorpusConfig(input=str(path)), work=tmp_path / "work")
    assert sorted(file.name for file in prefix.parent.iterdir()) == ["web.bin", "web.idx", "web.json"]
    assert not (tmp_path / "work").exists()


def test_a_changed_input_is_tokenized_again(prepare, tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["old"])
    prepare(CorpusConfig(input=str(path)))
    write_jsonl(path, ["new text"])
    _, prefix = prepare(CorpusConfig(input=str(path)))
    assert documents_of(prefix, tokenizer) == ["new text"]


def test_facts_are_written_beside_the_pair(prepare, tmp_path):
    facts, prefix = prepare(CorpusConfig(input=str(write_jsonl(tmp_path / "a.jsonl", ["one", "two"]))))
    assert read_facts(Path(f"{prefix}.json")) == facts
    assert facts.dtype == "uint16"
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match="not the facts of a prepared corpus"):
        read_facts(tmp_path / "bad.json")


def test_a_folder_is_read_by_kind_glob_and_exclude(prepare, tokenizer, tmp_path):
    root = tmp_path / "in"
    (root / "tests").mkdir(parents=True)
    (root / "a.txt").write_bytes(b"line\r\nends stay")
    write_jsonl(root / "b.jsonl", ["from jsonl"], key="body")
    (root / "c.txt").write_bytes(b"\xff\xfe broken")
    (root / "tests" / "d.txt").write_text("left out")
    (root / "e.md").write_text("left out by glob")
    corpus = CorpusConfig(input=str(root), glob="**/*.[tj]*", exclude=["*/tests/*"], text_key="body")
    facts, prefix = prepare(corpus)
    assert sorted(documents_of(prefix, tokenizer)) == ["from jsonl", "line\r\nends stay"]
    assert facts.skipped.undecodable_files == 1


def test_only_docstrings_are_kept_when_asked(prepare, tokenizer, tmp_path):
    (tmp_path / "in").mkdir()
    source = '"""Module."""\nclass A:\n    """A."""\n    def f(self):\n        """F."""\nx = "no"\n'
    (tmp_path / "in" / "a.py").write_text(source)
    (tmp_path / "in" / "b.py").write_text("x = 1\n")
    (tmp_path / "in" / "c.py").write_text("not python at all")
    facts, prefix = prepare(CorpusConfig(input=str(tmp_path / "in"), docstrings_only=True))
    assert documents_of(prefix, tokenizer) == ["Module.\n\nA.\n\nF."]
    assert (facts.skipped.without_docstring, facts.skipped.undecodable_files) == (1, 1)


def test_the_standard_library_is_a_corpus_without_its_tests():
    corpus = CorpusConfig(input="stdlib", glob="**/[a-d]*.py", docstrings_only=True)
    documents = list(read_documents(corpus, name="stdlib"))
    assert any("abstract base classes" in text.lower() for text in documents)
    parts = {part for path in list_files(corpus, name="stdlib") for part in path.parts}
    assert not parts & {"site-packages", "test", "tests", "__pycache__", "encodings", "idle_test"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"text": "ok"}\n\n{"text": \n', r"a\.jsonl, line 3: "),
        (b'{"text": "ok"}\n{"body": "x"}\n', r"a\.jsonl, line 2: no key 'text', it has 'body'"),
        (b"[1]\n", r"line 1: expected a JSON object, got list"),
        (b'{"text": 3}\n', r"line 1: 'text' must be a string, got int"),
        (b'{"text": "\\ud800"}\n', r"line 1: .*surrogates not allowed"),
        (b'{"text": "\xff"}\n', r"line 1: "),
        (b"\n \n", "no documents in"),
    ],
)
@pytest.mark.parametrize("shard_bytes", [10, 1 << 20])
def test_bad_jsonl_is_refused_naming_file_and_line(prepare, tmp_path, monkeypatch, lines, message, shard_bytes):
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(UserError, match=message) as caught:
        prepare(CorpusConfig(input=str(tmp_path / "a.jsonl")))
    assert "\n" not in str(caught.value)


def test_an_error_in_a_worker_process_reaches_the_user(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 20)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "ok"}\n' * 5 + b"{\n")
    with pytest.raises(UserError, match="line 6"):
        prepare(CorpusConfig(input=str(tmp_path / "a.jsonl")), workers=2)


def test_a_killed_worker_is_reported_and_does_not_hang(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 200)
    monkeypatch.setattr("minitron_nemo.data.prepare.write_shard", killed)
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    with pytest.raises(UserError, match="workers=2: a worker process was killed"):
        prepare(CorpusConfig(input=str(path)), workers=2)


def test_missing_and_empty_inputs_are_refused(prepare, tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        prepare(CorpusConfig(input=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no files for glob"):
        prepare(CorpusConfig(input=str(tmp_path / "empty")))
    (tmp_path / "binary.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="no documents in .*'undecodable_files': 1"):
        prepare(CorpusConfig(input=str(tmp_path / "binary.txt")))


@pytest.mark.parametrize(("add_bos", "first"), [(None, [1]), (True, [1]), (False, [])])
@pytest.mark.parametrize("template", ["llama3", "mistral"])
def test_documents_begin_and_end_as_the_tokenizer_says(tmp_path, add_bos, first, template):
    """Here the end token is 2 and the begin token 1."""
    tokenizer = load_tokenizer(save_templated_tokenizer(tmp_path / "tokenizer", template))
    write_jsonl(tmp_path / "a.jsonl", [f"w{i} w{i + 1}" for i in range(20)])
    corpus = CorpusConfig(input=str(tmp_path / "a.jsonl"))
    facts = prepare_corpus(
        "web", corpus, tokenizer=tokenizer, output=tmp_path / "out", add_bos=add_bos, show_progress=False
    )
    indexed = IndexedDataset(str(tmp_path / "out" / "web"))
    found = sorted(indexed[i].tolist() for i in range(20))
    assert found == [[*first, 3 + i, 4 + i, 2] for i in range(20)]
    assert facts.tokens == sum(map(len, found))
    assert (facts.bos, facts.eod) == (first[0] if first else None, 2)


def test_shards_made_without_the_begin_token_are_not_taken_up_with_it(tmp_path):
    tokenizer = load_tokenizer(save_templated_tokenizer(tmp_path / "tokenizer"))
    path = write_jsonl(tmp_path / "a.jsonl", ["w1"])
    keys = {
        shards.plan_shards(
            [path], CorpusConfig(), tokenizer=tokenizer, bos=bos, dtype="uint16", folder=tmp_path
        )[0].key
        for bos in (None, 0, 1)
    }  # fmt: skip
    assert len(keys) == 3


def test_facts_of_a_corpus_made_before_there_was_a_begin_token_are_read(prepare, tmp_path):
    facts, prefix = prepare(CorpusConfig(input=str(write_jsonl(tmp_path / "a.jsonl", ["one", "two"]))))
    path = Path(f"{prefix}.json")
    path.write_text(json.dumps({name: x for name, x in json.loads(path.read_text()).items() if name != "bos"}))
    assert read_facts(path) == facts


def test_a_corpus_name_cannot_leave_the_output_folder(tokenizer, tmp_path):
    for name in ("../web", "a/b", "", ".hidden"):
        with pytest.raises(UserError, match="plain file name"):
            prepare_corpus(name, CorpusConfig(input="x"), tokenizer=tokenizer, output=tmp_path, show_progress=False)


def test_document_order_is_that_of_the_hash_not_of_the_position(prepare, tokenizer, tmp_path):
    texts = make_texts(30)
    a = prepare(CorpusConfig(input=str(write_jsonl(tmp_path / "a.jsonl", texts))), output="a")[1]
    b = prepare(CorpusConfig(input=str(write_jsonl(tmp_path / "b.jsonl", texts[::-1]))), output="b")[1]
    assert pair_of(a) == pair_of(b)
    order = [texts.index(text) for text in documents_of(a, tokenizer)]
    assert np.abs(np.corrcoef(order, np.arange(30))[0, 1]) < 0.6
