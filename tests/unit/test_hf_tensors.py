"""Hugging Face folders: an export of an import is the import, and a bad folder is refused by name."""

import dataclasses
import json
import os
import shutil
import struct

import pytest
import torch
from hf_models import LLAMA3_ROPE, save_tiny_hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint import finite
from minitron_nemo.checkpoint.formats import hf
from minitron_nemo.checkpoint.formats.hf_names import hf_tensors
from minitron_nemo.checkpoint.formats.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.random_init import RandomWeights
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.config.schema import Config, ExportHfConfig
from minitron_nemo.data.tokenizer import train_tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import FAMILIES, ModelArch
from minitron_nemo.shape.axes import shrink
from minitron_nemo.shape.packing import GroupedQuery
from minitron_nemo.shape.tensors import logical_tensors
from minitron_nemo.testing import TINY

CASES = {
    "llama3": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "multihead": ("llama", {"num_key_value_heads": 4, "head_dim": None}),
    "mistral": ("mistral", {"vocab_size": 128, "num_hidden_layers": 3}),
    "nemotron": ("nemotron", {}),
    "one_group": ("nemotron", {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default",
                  "rope_theta": 10000.0, "partial_rotary_factor": 1.0}}),
    "qwen2": ("qwen2", {}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
}  # fmt: skip


def convert(source, tmp_path, **options):
    """Import and export again; returns (opened .nemo, exported folder)."""
    folder = hf.open_hf(source)
    hf.import_hf(folder, tmp_path / "x.nemo", tensors=stream(folder.weights), origin=Origin("f"))
    nemo = open_nemo(tmp_path / "x.nemo", verify=True)
    hf.export_hf(nemo, tmp_path / "out", origin=Origin("e"), **options)
    return nemo, tmp_path / "out"


def all_tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.bfloat16) for case in CASES), ("llama3", torch.float32), ("llama3", torch.float16)],
)
def test_an_export_of_an_import_is_bit_equal(tmp_path, case, dtype):
    family, overrides = CASES[case]
    source = save_tiny_hf(tmp_path / "in", family, dtype=dtype, **overrides)
    nemo, out = convert(source, tmp_path)
    assert nemo.dtype == dtype
    before, after = all_tensors(source), all_tensors(out)
    assert set(before) == set(after)
    assert all(before[name].dtype == after[name].dtype == dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = [json.loads((folder / "config.json").read_text()) for folder in (source, out)]
    assert config[0] == config[1]
    names = ["generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert all((source / name).read_bytes() == (out / name).read_bytes() for name in names)
    assert not (out / "hf_config.json").exists()


@pytest.mark.parametrize("case", list(CASES))
def test_transformers_opens_the_export_and_computes_the_same_logits(tmp_path, case):
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    family, overrides = CASES[case]
    source = save_tiny_hf(tmp_path / "in", family, **overrides)
    _, out = convert(source, tmp_path, shard_bytes=40_000)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(folder)(tokens).logits for folder in (source, out)]
    assert torch.equal(*logits)
    assert logits[0].std() > 0.01
    # Of a Qwen2 model transformers 5 takes byte-level BPE for granted, which the tiny tokenizer is not.
    opener = PreTrainedTokenizerFast if family == "qwen2" else AutoTokenizer
    assert opener.from_pretrained(out)("w0 w5").input_ids == [3, 8]
    with safe_open(next(out.glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_what_the_index_says_and_stay_under_the_limit(tmp_path):
    source = save_tiny_hf(tmp_path / "in", "llama", max_shard_size="40KB")
    assert (source / hf.INDEX_FILE).exists()
    _, out = convert(source, tmp_path, shard_bytes=40_000)
    index = json.loads((out / hf.INDEX_FILE).read_text())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    for file in files:
        tensors = load_file(out / file)
        assert set(tensors) == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(t.nbytes for t in tensors.values()) <= 40_000
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in all_tensors(out).values())


def test_queries_keys_and_values_are_packed_by_query_group():
    arch = ModelArch(1, 8, 8, 4, 2, 3, 16, 16)
    marked = [torch.arange(heads)[:, None, None].add(start).expand(heads, 3, 8).reshape(-1, 8)
              for heads, start in ((4, 0), (2, 10), (2, 20))]  # fmt: skip
    packed = GroupedQuery().from_hf(marked, arch)
    assert packed[:, 0].tolist() == [head for head in (0, 1, 10, 20, 2, 3, 11, 21) for _ in range(3)]
    again = GroupedQuery().to_hf(packed, arch)
    assert all(torch.equal(a, b) for a, b in zip(again, marked, strict=True))


def test_each_query_group_is_its_queries_then_its_key_then_its_value(tmp_path):
    """Two groups of two query heads, 12 channels each."""
    folder = hf.open_hf(save_tiny_hf(tmp_path / "in", "llama", tokenizer=False))
    tensors = all_tensors(folder.path)
    q, k, v = (tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv")
    expected = torch.cat([q[:24], k[:12], v[:12], q[24:], k[12:], v[12:]])
    assert torch.equal(folder.weights.read("decoder.layers.1.self_attention.linear_qkv.weight"), expected)


def test_gate_comes_before_up(tmp_path):
    folder = hf.open_hf(save_tiny_hf(tmp_path / "in", "llama", tokenizer=False))
    tensors = all_tensors(folder.path)
    gate, up = (tensors[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(folder.weights.read("decoder.layers.1.mlp.linear_fc1.weight"), torch.cat([gate, up]))


def test_each_norm_stands_before_the_matrix_it_feeds(tmp_path):
    folder = hf.open_hf(save_tiny_hf(tmp_path / "in", "nemotron", tokenizer=False))
    tensors = all_tensors(folder.path)
    names = {
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_{}": "model.layers.1.input_layernorm.{}",
        "decoder.layers.0.mlp.linear_fc1.layer_norm_{}": "model.layers.0.post_attention_layernorm.{}",
        "decoder.final_layernorm.{}": "model.norm.{}",
    }
    for part in ("weight", "bias"):
        for ours, theirs in names.items():
            assert torch.equal(folder.weights.read(ours.format(part)), tensors[theirs.format(part)])


def test_a_pruned_model_exports_with_the_config_of_its_source(tmp_path):
    """Width-pruned: `hidden_size` shrinks and `head_dim` stays, told by the config alone."""
    from transformers import AutoModelForCausalLM

    teacher, _ = convert(save_tiny_hf(tmp_path / "in", "llama"), tmp_path)
    small = shrink(teacher.arch, hidden_size=24, ffn_hidden_size=40, num_layers=1)
    tensors = (
        (name, teacher.weights.read(name)[tuple(slice(size) for size in logical.shape(small))])
        for name, logical in logical_tensors(small).items()
    )
    write_nemo(tmp_path / "y.nemo", small, tensors, dtype=torch.bfloat16, tokenizer=teacher.path, origin=Origin("f"))
    hf.export_hf(open_nemo(tmp_path / "y.nemo"), tmp_path / "small", origin=Origin("e"))
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == small.num_params()
    assert model.config.rope_parameters == LLAMA3_ROPE
    assert hf.arch_from_hf(tmp_path / "small") == small


def test_every_hugging_face_tensor_belongs_to_exactly_one_logical_tensor(tmp_path):
    for family in FAMILIES:
        folder = save_tiny_hf(tmp_path / family, family, tokenizer=False)
        names = [name for name, _ in hf_tensors(hf.arch_from_hf(folder))]
        assert sorted(names) == sorted(all_tensors(folder))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_hf(tmp_path_factory.mktemp("hf") / "in", "llama", tokenizer=False)


@pytest.fixture
def folder(tiny, tmp_path):
    """A fresh copy to damage."""
    return shutil.copytree(tiny, tmp_path / "copy")


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}), "q_proj.bias belongs to no"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), r"model.norm.weight is \(31,\);.* says \(32,\)"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32).half()}), "model.norm.weight is stored as F16"),
        (lambda t: t.update({n: x.double() for n, x in t.items()}), "is stored as F64"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(folder, change, message):
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        hf.open_hf(folder)


def test_rotary_buffers_and_the_second_name_of_a_tied_table_are_tolerated(folder):
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    names = {name for name, _ in hf_tensors(hf.open_hf(folder).arch)}
    assert "lm_head.weight" not in names


def shard_by_index(folder, name):
    """Turn the single file into one named by an index under `name`."""
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = load_file(folder / "a.safetensors")
    (folder / hf.INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..", "a.bin",
                                  "..\\a.safetensors"])  # fmt: skip
def test_an_index_that_leads_out_of_the_folder_is_refused(folder, name):
    shard_by_index(folder, name)
    with pytest.raises(UserError, match="names the file"):
        hf.open_hf(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="a link out of its folder is not followed"):
        hf.open_hf(folder)


def test_the_links_of_the_hub_cache_are_followed(folder, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "rev"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert hf.open_hf(snapshot).arch.hidden_size == 32


def test_a_missing_shard_and_a_shard_without_its_tensor_are_refused(folder):
    shard_by_index(folder, "b.safetensors")
    with pytest.raises(UserError, match="b.safetensors: named by model.safetensors.index.json"):
        hf.open_hf(folder)
    save_file({"other": torch.zeros(1)}, folder / "b.safetensors")
    with pytest.raises(UserError, match="b.safetensors: no tensor model.embed_tokens.weight"):
        hf.open_hf(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_weight_that_is_no_number_is_refused_naming_its_tensor(folder, tmp_path, monkeypatch, value, dtype, block):
    name = "model.layers.1.self_attn.k_proj.weight"

    def spoil(tensors):
        tensors.update({each: tensor.to(dtype) for each, tensor in tensors.items()})
        tensors[name][-1, -1] = value

    edit(folder, spoil)
    monkeypatch.setattr(finite, "_BLOCK", block)
    with pytest.raises(UserError, match=f"model.safetensors: tensor {name} is not all finite numbers"):
        convert(folder, tmp_path)
    assert not (tmp_path / "x.nemo").exists()


@pytest.mark.parametrize("said", [0, -1, 1, "many", True, None, 10**30, "right"])
def test_the_bytes_of_the_shards_are_those_of_the_index(folder, said):
    shard_by_index(folder, "a.safetensors")
    index = json.loads((folder / hf.INDEX_FILE).read_text())
    right = sum(tensor.nbytes for tensor in load_file(folder / "a.safetensors").values())
    index["metadata"] = {"total_size": right if said == "right" else said}
    (folder / hf.INDEX_FILE).write_text(json.dumps(index))
    if said in ("right", None):
        hf.open_hf(folder)
    else:
        with pytest.raises(UserError, match=f"total_size=.* have {right} bytes"):
            hf.open_hf(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "merges.txt"])
@pytest.mark.parametrize("instead", ["pipe", "folder", "device", "nothing"])
def test_what_is_no_regular_file_is_refused_by_name_and_never_opened(folder, name, instead):
    path = folder / name
    path.unlink(missing_ok=True)
    if instead == "pipe":
        os.mkfifo(path)
    elif instead == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if instead == "device" else "/no/such/file")
    with pytest.raises(UserError, match=f"{name}: not a regular file"):
        hf.source_files(folder)


def test_files_that_an_import_does_not_read_are_not_looked_at(folder):
    os.mkfifo(folder / "stray.json")
    (folder / "another.json").symlink_to("/dev/zero")
    (folder / "evals.json").mkdir()
    assert set(hf.source_files(folder)) == {"config.json", "generation_config.json"}


def test_a_small_file_that_is_huge_is_refused(folder):
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="tokenizer.json: 1099511627776 bytes"):
        hf.source_files(folder)


@pytest.mark.parametrize("data", [b"", b"\0" * 7, struct.pack("<Q", 2**60), struct.pack("<Q", 2) + b"{]"])
def test_a_damaged_safetensors_file_is_refused_by_name(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match="model.safetensors: not a readable safetensors file"):
        hf.open_hf(folder)


def test_a_file_that_is_cut_short_while_it_is_read_is_refused_by_name(folder, tmp_path):
    opened = hf.open_hf(folder)
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(UserError, match=r"model.safetensors: .* cannot be read: the file was cut short$"):
        hf.import_hf(opened, tmp_path / "out" / "x.nemo", tensors=stream(opened.weights), origin=Origin("f"))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_a_damaged_config_is_refused_by_name(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json: (not JSON|expected a JSON object)"):
        hf.open_hf(folder)


def test_a_folder_without_config_or_safetensors_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="is not a Hugging Face model folder: no config.json"):
        hf.open_hf(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="only safetensors weights are read"):
        hf.open_hf(folder)


def test_a_source_is_a_folder_or_a_hub_name(folder, monkeypatch):
    assert hf.resolve_source(str(folder)) == folder
    with pytest.raises(UserError, match="no such folder, and not a hub name"):
        hf.resolve_source("no/such/folder")
    import huggingface_hub

    def offline(*_, **options):
        assert "*.py" not in options["allow_patterns"]
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="meta-llama/X: no such folder here, and the hub gave nothing: no network$"):
        hf.resolve_source("meta-llama/X")


def test_an_export_of_a_model_from_scratch_carries_the_ids_of_its_tokenizer(tmp_path):
    """Without them transformers takes 2 for the end of a text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from recipes.export_hf import RECIPE

    tokenizer = train_tokenizer(["some words " * 9], vocab_size=262, output=tmp_path / "tokenizer")
    arch = dataclasses.replace(TINY["llama"], vocab_size=262)
    tensors = stream(RandomWeights(arch, seed=0))
    write_nemo(
        tmp_path / "s.nemo", arch, tensors, dtype=torch.float32, tokenizer=tokenizer.folder, origin=Origin("s")
    )  # fmt: skip
    config = Config(export_hf=ExportHfConfig(checkpoint=str(tmp_path / "s.nemo"), output=str(tmp_path / "s_hf")))
    RECIPE.run(config, RECIPE.prepare(config))
    opened = AutoConfig.from_pretrained(tmp_path / "s_hf")
    assert (opened.bos_token_id, opened.eos_token_id) == (0, 0) == (tokenizer.eod, tokenizer.eod)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "s_hf")
    assert model.generation_config.eos_token_id == 0


def test_an_export_replaces_an_export_only_when_asked_and_never_another_folder(tmp_path, tiny):
    nemo, out = convert(tiny, tmp_path)
    with pytest.raises(UserError, match="exists already"):
        hf.export_hf(nemo, out, origin=Origin("e"))
    hf.export_hf(nemo, out, origin=Origin("e", overwrite=True))
    with pytest.raises(UserError, match="never overwritten"):
        hf.export_hf(nemo, tiny, origin=Origin("e", overwrite=True))


def test_the_scaling_of_the_tests_is_not_megatrons_default():
    assert LLAMA3_ROPE["original_max_position_embeddings"] != 8192
