"""A `.nemo` folder gives back the tensors it was given, and anything less than whole is refused by name."""

import dataclasses
import json
import shutil

import pytest
import torch
import yaml

from minitron_nemo.arch import ModelArch, RopeScaling
from minitron_nemo.checkpoint.manifest import begin, finish
from minitron_nemo.checkpoint.nemo import describe_folder, open_nemo, stored_shape, write_nemo
from minitron_nemo.checkpoint.random_init import random_tensor
from minitron_nemo.checkpoint.torch_dist import TorchDistWriter, write_metadata
from minitron_nemo.errors import UserError
from minitron_nemo.parameters import EMBEDDING, OUTPUT, logical_tensors, parameters

LLAMA = ModelArch(2, 32, 48, 4, 2, 12, 131, 64, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 512))
NEMOTRON = dataclasses.replace(
    LLAMA, family="nemotron", activation="squared_relu", normalization="LayerNorm1p", rope_scaling=None
)
TIED = dataclasses.replace(LLAMA, share_embeddings_and_output_weights=True)


def source(arch, seed=1):
    return lambda parameter, layer: random_tensor(parameter, layer, arch=arch, seed=seed)


def make(path, arch=LLAMA, *, dtype=torch.float32, tokenizer=None, **fields):
    write_nemo(path, arch, tensors=source(arch), tokenizer=tokenizer, dtype=dtype, fingerprint="f", config={},
               parents={}, **fields)  # fmt: skip
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", [LLAMA, NEMOTRON, TIED], ids=["llama", "nemotron", "tied"])
def test_every_tensor_comes_back_bit_for_bit(tmp_path, arch, dtype):
    nemo = open_nemo(make(tmp_path / "x.nemo", arch, dtype=dtype), verify=True)
    assert (nemo.arch, nemo.dtype) == (arch, dtype)
    for parameter, layer in logical_tensors(arch):
        assert torch.equal(nemo.read(parameter, layer), source(arch)(parameter, layer).to(dtype))
    assert sum(nemo.read(*pair).numel() for pair in logical_tensors(arch)) == arch.num_params()


def test_a_tied_model_stores_one_table(tmp_path):
    keys = open_nemo(make(tmp_path / "x.nemo", TIED)).reader.keys()
    assert EMBEDDING in keys
    assert OUTPUT not in keys


def test_progress_counts_every_tensor(tmp_path):
    seen = []
    make(tmp_path / "x.nemo", progress=lambda done, total: seen.append((done, total)))
    total = len(logical_tensors(LLAMA))
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_padded_and_split_weights_read_as_the_logical_tensor(tmp_path):
    """Two tensor-parallel ranks, each with its own file, the vocabulary padded to 144 rows."""
    temp = begin(tmp_path / "x.nemo")
    describe_folder(temp, LLAMA, torch.float32, None)
    (temp / "model_weights").mkdir()
    records = []
    for rank in range(2):
        writer = TorchDistWriter(temp / "model_weights", rank=rank)
        for parameter, layer in logical_tensors(LLAMA):
            shape = stored_shape(parameter, LLAMA)
            tensor = source(LLAMA)(parameter, layer)
            if parameter.key in (EMBEDDING, OUTPUT):
                tensor = torch.cat([tensor, torch.full((13, 32), 9.0)])
                shape = (144, 32)
            offset = [0] * tensor.dim()
            if parameter.split is not None:
                part = tensor.shape[parameter.split] // 2
                offset[parameter.split] = rank * part
                tensor = tensor.narrow(parameter.split, rank * part, part)
            elif rank == 1:
                continue
            if layer is not None:
                tensor, offset = tensor[None], [layer, *offset]
            writer.write(parameter.key, tensor, global_shape=shape, offset=offset)
        records += writer.close()
    write_metadata(temp / "model_weights", json.loads(json.dumps(records)))
    finish(temp, tmp_path / "x.nemo", kind="model", fingerprint="f", config={}, parents={})
    nemo = open_nemo(tmp_path / "x.nemo", verify=True)
    for parameter, layer in logical_tensors(LLAMA):
        assert torch.equal(nemo.read(parameter, layer), source(LLAMA)(parameter, layer))


def test_the_tokenizer_is_copied_and_code_and_weights_beside_it_are_not(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenization_evil.py", "model.safetensors", "config.json"):
        (folder / name).write_text(name)
    nemo = open_nemo(make(tmp_path / "x.nemo", tokenizer=folder))
    assert sorted(p.name for p in nemo.tokenizer.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    again = open_nemo(make(tmp_path / "y.nemo", tokenizer=nemo.path))
    assert (again.tokenizer / "tokenizer.json").read_text() == "tokenizer.json"


def rewrite_config(path, **changes):
    """Edit fields of model_config.yaml."""
    values = yaml.safe_load((path / "model_config.yaml").read_text())
    values.update(changes)
    replace_config(path, yaml.safe_dump({k: v for k, v in values.items() if v != "absent"}))


def replace_config(path, text):
    """Replace model_config.yaml and keep the manifest's sizes in step."""
    file = path / "model_config.yaml"
    file.write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model_config.yaml"]["size"] = file.stat().st_size
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_hidden_size": 47}, r"mlp.linear_fc1.weight is \(2, 96, 32\); model_config.yaml says \(2, 94, 32\)"),
        ({"num_layers": 3}, "tensor decoder.layers.self_attention.linear_qkv.layer_norm_weight is"),
        ({"vocab_size": 132}, "tensor embedding.word_embeddings.weight is"),
        ({"share_embeddings_and_output_weights": True}, "tensor output_layer.weight belongs to no parameter"),
        ({"normalization": "LayerNorm1p"}, "layer_norm_bias is missing"),
        ({"precision": "bf16"}, "is torch.float32; model_config.yaml says torch.bfloat16"),
        ({"precision": "int4"}, "precision='int4': allowed are bf16, fp16, fp32"),
        ({"hidden_size": "absent"}, "field 'hidden_size' is missing"),
        ({"_target_": "os.system"}, "unknown field '_target_'"),
    ],
)
def test_a_shape_that_does_not_fit_the_weights_is_refused_by_name(tmp_path, changes, message):
    path = make(tmp_path / "x.nemo")
    rewrite_config(path, **changes)
    with pytest.raises(UserError, match=message):
        open_nemo(path)


def test_yaml_that_would_run_code_is_refused(tmp_path):
    path = make(tmp_path / "x.nemo")
    replace_config(path, f"!!python/object/apply:os.mkdir ['{tmp_path / 'canary'}']")
    with pytest.raises(UserError, match="not readable YAML"):
        open_nemo(path)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("missing", ["manifest.json", "model_config.yaml"])
def test_a_folder_without_its_description_is_not_a_model(tmp_path, missing):
    path = make(tmp_path / "x.nemo")
    (path / missing).unlink()
    with pytest.raises(UserError, match=f"x.nemo is not a .nemo model folder: no {missing}"):
        open_nemo(path)


def test_a_missing_folder_and_a_missing_file_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="is not a .nemo model folder: no such folder"):
        open_nemo(tmp_path / "nowhere.nemo")
    path = make(tmp_path / "x.nemo")
    shutil.rmtree(path / "model_weights")
    with pytest.raises(UserError, match="model_weights/.metadata"):
        open_nemo(path)


def test_a_flipped_bit_in_the_weights_is_refused_when_verifying(tmp_path):
    path = make(tmp_path / "x.nemo")
    file = path / "model_weights" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="__0_0.distcp: damaged"):
        open_nemo(path, verify=True)


def test_a_tensor_of_the_wrong_shape_is_never_written(tmp_path):
    with pytest.raises(AssertionError, match="expected"):
        write_nemo(tmp_path / "x.nemo", LLAMA, tensors=lambda *_: torch.zeros(2), tokenizer=None,
                   dtype=torch.float32, fingerprint="f", config={}, parents={})  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_layer_is_given_exactly_for_parameters_of_layers(tmp_path):
    nemo = open_nemo(make(tmp_path / "x.nemo"))
    table = parameters(LLAMA)
    with pytest.raises(ValueError, match="layer=0"):
        nemo.read(table[0], 0)
    with pytest.raises(ValueError, match="layer=None"):
        nemo.read(table[1])
