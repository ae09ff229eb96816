import itertools
import json
import multiprocessing
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data.blend import Blend
from minitron_nemo.data.datasets import _megatron_config, batch, build_datasets
from minitron_nemo.data.prepare import prepare_corpus
from minitron_nemo.data.sample_ids import SampleId, sample_ids
from minitron_nemo.data.tokenizer import load_tokenizer, train_tokenizer
from minitron_nemo.errors import UserError

WEIGHTS = {"web": 3.0, "code": 1.0}
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


def make_corpus(prepared, name, tokenizer, *, documents=60, seed=0):
    rng = np.random.default_rng(seed)
    source = prepared.parent / f"{name}.jsonl"
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(5, 40))) for _ in range(documents)]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare_corpus(name, CorpusConfig(input=str(source)), tokenizer=tokenizer, output=prepared, show_progress=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder of prepared corpora, tokenizer)"""
    root = tmp_path_factory.mktemp("world")
    tokenizer = train_tokenizer([" ".join(WORDS)], vocab_size=270, output=root / "tokenizer")
    make_corpus(root / "data", "web", tokenizer, seed=1)
    make_corpus(root / "data", "code", tokenizer, seed=2)
    return root / "data", tokenizer


def blend_of(prepared, tokenizer, cache):
    return Blend(
        WEIGHTS, prepared=prepared, cache=cache, seq_length=16, split="80,20,0", seed=5, tokenizer=tokenizer,
        vocab_size=270,
    )  # fmt: skip


@pytest.fixture
def build(world, tmp_path):
    def run(*, num_train=40, num_valid=8, **changes):
        blend = replace(blend_of(*world, tmp_path / "cache"), **changes)
        return build_datasets(blend, num_train=num_train, num_valid=num_valid)

    return run


def all_samples(dataset, count):
    return batch(dataset, range(count))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_samples_have_the_right_shapes_and_labels_are_one_token_ahead(build):
    train, valid = build()
    assert (len(train), len(valid)) == (40, 8)
    values = all_samples(train, 40)
    assert {name: (tuple(x.shape), x.dtype) for name, x in values.items()} == {
        "tokens": ((40, 16), torch.int64), "labels": ((40, 16), torch.int64), "loss_mask": ((40, 16), torch.float32),
        "sources": ((40, 16), torch.int64),
    }  # fmt: skip
    assert torch.equal(values["tokens"][:, 1:], values["labels"][:, :-1])
    assert (values["loss_mask"] == 1).all()


@pytest.mark.parametrize("blend", [{"web": 1.0}, {"web": 3.0, "code": 1.0}])
def test_samples_are_those_of_megatrons_own_builder(build, world, tmp_path, blend):
    prepared, tokenizer = world
    train, valid = build(weights=blend, num_train=200, num_valid=20)
    config = _megatron_config(blend_of(prepared, tokenizer, tmp_path / "cache"), seed=5)
    config.path_to_cache = str(tmp_path / "theirs")
    names = sorted(blend)
    weights = [blend[name] for name in names] if len(names) > 1 else None
    config.blend = ([str(prepared / name) for name in names], weights)
    # Megatron 0.16 blends only inside a process group.
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        theirs = BlendedMegatronDatasetBuilder(GPTDataset, [200, 20, 0], lambda: True, config).build()
    finally:
        dist.destroy_process_group()
    assert equal(all_samples(train, 200), all_samples(theirs[0], 200))
    assert equal(all_samples(valid, 20), all_samples(theirs[1], 20))


def test_the_same_arguments_give_the_same_samples_with_and_without_the_cache(build, tmp_path):
    first = all_samples(build()[0], 40)
    written = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert equal(first, all_samples(build()[0], 40))
    assert equal(first, all_samples(build(cache=tmp_path / "other")[0], 40))
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == written
    assert not any(".tmp" in name for name in written)


def test_the_seed_and_the_weights_decide_but_the_order_of_the_blend_does_not(build):
    first = all_samples(build()[0], 40)
    assert not equal(first, all_samples(build(seed=6)[0], 40))
    assert not equal(first, all_samples(build(weights={"web": 1.0, "code": 3.0})[0], 40))
    assert equal(first, all_samples(build(weights={"code": 2.0, "web": 6.0})[0], 40))


def test_each_purpose_has_its_own_order_of_training_samples_and_all_the_same_held_out_ones(build):
    drawn = {purpose: build(purpose=purpose) for purpose in ("", "correct_teacher", "distill", "calibration")}
    trains = [all_samples(train, 40)["tokens"] for train, _ in drawn.values()]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(trains, 2))
    valids = [all_samples(valid, 8) for _, valid in drawn.values()]
    assert all(equal(valids[0], valid) for valid in valids)
    assert torch.equal(all_samples(build(purpose="distill")[0], 40)["tokens"], trains[2])


def test_weights_are_the_shares_of_the_samples(build, world):
    train, _ = build(num_train=400)
    from_web = sum(train[i]["dataset_id"] == sorted(WEIGHTS).index("web") for i in range(400))
    assert from_web == 300


def test_a_longer_run_within_one_pass_begins_with_the_samples_of_the_shorter(build):
    assert equal(all_samples(build(num_train=10)[0], 10), all_samples(build(num_train=20)[0], 10))


def test_training_and_validation_share_no_document(build, world):
    prepared, tokenizer = world
    train, valid = build(weights={"web": 1.0})
    assert not set(train.indices) & set(valid.indices)
    assert len(train.indices) + len(valid.indices) == len(IndexedDataset(str(prepared / "web")))


def test_a_split_nobody_asks_for_is_not_built(build):
    train, valid = build(split="100,0,0", num_valid=0)
    assert valid is None
    assert len(train) == 40
    assert build(num_train=0)[0] is None


def test_a_corpus_prepared_again_is_not_read_through_the_old_indices(build, world, tmp_path):
    _, tokenizer = world
    prepared = tmp_path / "again"
    make_corpus(prepared, "web", tokenizer, documents=60)
    build(weights={"web": 1.0}, prepared=prepared)
    make_corpus(prepared, "web", tokenizer, documents=20, seed=9)
    used = all_samples(build(weights={"web": 1.0}, prepared=prepared)[0], 40)
    assert equal(used, all_samples(build(weights={"web": 1.0}, prepared=prepared, cache=tmp_path / "fresh")[0], 40))


def _rank(rank, folder, prepared, tokenizer_folder, queue):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    blend = blend_of(prepared, load_tokenizer(tokenizer_folder), folder / "shared")
    train, valid = build_datasets(blend, num_train=40, num_valid=8)
    queue.put((rank, all_samples(train, 40)["tokens"].numpy(), all_samples(valid, 8)["tokens"].numpy()))
    dist.barrier()
    dist.destroy_process_group()


def test_every_rank_sees_the_samples_of_a_single_process(build, world, tmp_path):
    prepared, tokenizer = world
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    ranks = [context.Process(target=_rank, args=(r, tmp_path, prepared, tokenizer.folder, queue)) for r in range(2)]
    for process in ranks:
        process.start()
    results = [queue.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0
    train, valid = build()
    for _, train_tokens, valid_tokens in results:
        assert np.array_equal(train_tokens, all_samples(train, 40)["tokens"].numpy())
        assert np.array_equal(valid_tokens, all_samples(valid, 8)["tokens"].numpy())


def test_a_pickle_planted_in_the_cache_is_not_opened(build, tmp_path):
    class Canary:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "canary",))

    first = all_samples(build()[0], 40)
    planted = list((tmp_path / "cache").rglob("*.npy"))
    for path in planted:
        path.write_bytes(pickle.dumps(Canary()))
    assert planted
    assert equal(first, all_samples(build()[0], 40))
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("pattern", ["*document_index.npy", "*sample_index.npy", "*shuffle_index.npy", "hashes.json"])
@pytest.mark.parametrize("damage", ["empty", "half", "flip", "zeros", "other shape", "gone", "folder"])
def test_damaged_indices_are_built_again(build, tmp_path, pattern, damage):
    first = all_samples(build()[0], 40)
    found = list((tmp_path / "cache").rglob(pattern))
    assert found
    for path in found:
        raw = path.read_bytes()
        if damage == "empty":
            path.write_bytes(b"")
        elif damage == "half":
            path.write_bytes(raw[: len(raw) // 2])
        elif damage == "flip":
            path.write_bytes(raw[:-2] + bytes([raw[-2] ^ 64]) + raw[-1:])
        elif damage == "zeros":
            path.write_bytes(bytes(len(raw)))
        elif damage == "other shape":
            with path.open("wb") as file:
                np.save(file, np.zeros((3, 5), dtype=np.float32))
        else:
            path.unlink()
            if damage == "folder":
                path.mkdir()
    for _ in range(2):
        assert equal(first, all_samples(build()[0], 40))


@pytest.mark.parametrize("instead", ["file", "link"])
def test_something_else_in_the_place_of_the_indices_is_replaced(build, tmp_path, instead):
    first = all_samples(build()[0], 40)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("kept")
    for folder in [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]:
        shutil.rmtree(folder)
        folder.write_text("") if instead == "file" else folder.symlink_to(tmp_path / "elsewhere")
    assert equal(first, all_samples(build()[0], 40))
    assert (tmp_path / "elsewhere" / "mine").read_text() == "kept"


def test_an_interrupted_cache_is_not_taken_for_a_whole_one(build, monkeypatch, tmp_path):
    real_save = np.save

    def dies(path, *args, **kwargs):
        if "shuffle_index" in str(path):
            Path(path).write_bytes(b"\x93NUMPY\x01")
            raise KeyboardInterrupt
        return real_save(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            build()
    assert equal(all_samples(build()[0], 40), all_samples(build(cache=tmp_path / "other")[0], 40))


def test_a_missing_corpus_is_named_with_the_way_to_make_it(build):
    with pytest.raises(UserError, match=r"blend\.books: no books\.bin .*it has code, web.*recipes/prepare_data\.py"):
        build(weights={"books": 1.0})
    with pytest.raises(UserError, match=r"data\.blend is empty"):
        build(weights={})


def test_a_blend_key_may_be_a_path(build, world, tmp_path):
    prepared, _ = world
    by_path = build(weights={str(prepared / "web"): 1.0}, prepared=tmp_path)[0]
    assert equal(all_samples(by_path, 40), all_samples(build(weights={"web": 1.0})[0], 40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "100,0,0"}, r"leaves 0 of 60 documents \(0 tokens\) for validation"),
        ({"split": "99,1,0", "seq_length": 400}, "for validation, fewer than one sample of data.seq_length=400"),
        ({"seq_length": 10**6}, "for training, fewer than one sample"),
    ],
)
def test_too_short_a_corpus_is_refused(build, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        build(**changes)
    assert "\n" not in str(caught.value)


def test_a_corpus_of_another_tokenizer_is_refused(build, tmp_path):
    other = train_tokenizer([" ".join(WORDS)], vocab_size=265, output=tmp_path / "tokenizer")
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        build(tokenizer=other)
    with pytest.raises(UserError, match="tokenizer has 270 ids and the model a vocabulary of 269"):
        build(vocab_size=269)


@pytest.mark.parametrize("position", [0, 2_499_999])
def test_ids_the_model_does_not_have_are_found_in_a_foreign_corpus(build, tmp_path, position):
    tokens = np.ones(2_500_000, dtype=np.uint16)
    tokens[position] = 270
    builder = IndexedDatasetBuilder(str(tmp_path / "foreign.bin"), dtype=np.uint16)
    builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "foreign.idx"))
    with pytest.raises(UserError, match=rf"token {position} is 270, the model has ids 0\.\.269"):
        build(weights={str(tmp_path / "foreign"): 1.0}, num_valid=0)
    with pytest.raises(UserError, match="tokenizer has 270 ids"):
        build(weights={str(tmp_path / "foreign"): 1.0}, split="100,0,0", num_valid=0, vocab_size=100)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("size", [0, 1, 20, -1])
def test_a_truncated_pair_is_refused_naming_the_file(build, world, tmp_path, suffix, size):
    for path in world[0].glob("web.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    target = tmp_path / f"web{suffix}"
    target.write_bytes(target.read_bytes()[:size])
    with pytest.raises(UserError, match=rf"web\{suffix}: .*recipes/prepare_data\.py"):
        build(weights={"web": 1.0}, prepared=tmp_path)


def test_a_pair_and_facts_that_disagree_are_refused(build, world, tmp_path):
    for path in world[0].glob("web.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    facts = json.loads((tmp_path / "web.json").read_text())
    (tmp_path / "web.json").write_text(json.dumps({**facts, "tokens": facts["tokens"] + 1}))
    with pytest.raises(UserError, match=r"web\.json says .* tokens, \.idx"):
        build(weights={"web": 1.0}, prepared=tmp_path)


def test_a_sample_is_a_stretch_of_the_documents_that_it_is_said_to_be_of(build, world):
    for weights in (WEIGHTS, {"code": 1.0}):
        train, _ = build(weights=weights, num_valid=0)
        found = sample_ids(train, range(40), sources=sorted(weights))
        assert {sample.source for sample in found} == set(weights)
        assert max(len(sample.documents) for sample in found) > 1
        for sample in found:
            corpus = IndexedDataset(str(world[0] / sample.source))
            text = [token for number in sample.documents for token in corpus[number].tolist()]
            tokens = train[sample.number]["tokens"].tolist()
            assert any(text[n : n + len(tokens)] == tokens for n in range(len(corpus[sample.documents[0]])))


def test_a_sample_is_named_in_few_words():
    assert str(SampleId(57, "code", (12,))) == "sample 57 of code (document 12)"
    assert str(SampleId(57, "code", (12, 13, 14, 15))) == "sample 57 of code (documents 12, 13, 14, ...)"


def test_every_token_of_a_sample_says_its_source(build):
    train, _ = build()
    values = all_samples(train, 40)
    wanted = torch.tensor([sample.source == "web" for sample in sample_ids(train, range(40), sources=("code", "web"))])
    assert torch.equal(values["sources"], wanted.long()[:, None].expand(40, 16))
    alone, _ = build(weights={"web": 1.0})
    assert not all_samples(alone, 40)["sources"].any()
