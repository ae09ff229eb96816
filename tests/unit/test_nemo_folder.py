"""A `.nemo` folder gives back the tensors it was given, and anything less than whole is refused by name."""

import dataclasses
import json
import shutil

import pytest
import torch
import yaml

from minitron_nemo.artefacts.contents import read_small
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.checkpoint.formats.nemo import describe_folder, open_nemo, write_nemo
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.random_init import RandomWeights
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.checkpoint.torch_dist import TorchDistWriter, write_metadata
from minitron_nemo.checkpoint.torch_dist_weights import stored_shape
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch, RopeScaling
from minitron_nemo.shape.tensors import EMBEDDING, OUTPUT, logical_tensors
from minitron_nemo.testing import TINY, random_nemo

LLAMA = ModelArch(2, 32, 48, 4, 2, 12, 131, 64, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 512))
NEMOTRON = dataclasses.replace(
    LLAMA, family="nemotron", activation="squared_relu", normalization="LayerNorm1p", rope_scaling=None
)
TIED = dataclasses.replace(LLAMA, share_embeddings_and_output_weights=True)


def source(arch, seed=1):
    return RandomWeights(arch, seed=seed)


def make(path, arch=LLAMA, *, dtype=torch.float32, tokenizer=None):
    write_nemo(path, arch, stream(source(arch)), dtype=dtype, tokenizer=tokenizer, origin=Origin("f"))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", [LLAMA, NEMOTRON, TIED], ids=["llama", "nemotron", "tied"])
def test_every_tensor_comes_back_bit_for_bit(tmp_path, arch, dtype):
    nemo = open_nemo(make(tmp_path / "x.nemo", arch, dtype=dtype), verify=True)
    assert (nemo.arch, nemo.dtype) == (arch, dtype)
    assert nemo.weights.names() == list(logical_tensors(arch))
    for name in nemo.weights.names():
        assert torch.equal(nemo.weights.read(name), source(arch).read(name).to(dtype))
        assert (nemo.weights.shape(name), nemo.weights.dtype(name)) == (tuple(nemo.weights.read(name).shape), dtype)
    assert sum(tensor.numel() for _, tensor in stream(nemo.weights)) == arch.num_params()


def test_a_box_of_a_tensor_is_that_part_of_it(tmp_path):
    weights = open_nemo(make(tmp_path / "x.nemo")).weights
    for name in ("decoder.layers.1.mlp.linear_fc1.weight", EMBEDDING):
        assert torch.equal(weights.read(name, Box((3, 1), (7, 4))), source(LLAMA).read(name)[3:10, 1:5])


def test_a_tied_model_stores_one_table(tmp_path):
    keys = open_nemo(make(tmp_path / "x.nemo", TIED)).weights.reader.keys()
    assert EMBEDDING in keys
    assert OUTPUT not in keys


def test_padded_and_split_weights_read_as_the_logical_tensor(tmp_path):
    """Two tensor-parallel ranks, each with its own file, the vocabulary padded to 144 rows."""
    with publishing(tmp_path / "x.nemo", kind="model", origin=Origin("f")) as draft:
        describe_folder(draft.folder, LLAMA, dtype=torch.float32, tokenizer=None)
        (draft.folder / "model_weights").mkdir()
        records = [record for rank in range(2) for record in write_half(draft.folder / "model_weights", rank)]
        write_metadata(draft.folder / "model_weights", json.loads(json.dumps(records)))
    weights = open_nemo(tmp_path / "x.nemo", verify=True).weights
    for name in logical_tensors(LLAMA):
        assert torch.equal(weights.read(name), source(LLAMA).read(name))


def write_half(folder, rank):
    """The part of tensor-parallel rank `rank` of 2; returns its chunk records."""
    writer = TorchDistWriter(folder, rank=rank)
    for name, logical in logical_tensors(LLAMA).items():
        parameter, layer = logical.row, logical.layer
        shape = stored_shape(parameter, LLAMA)
        tensor = source(LLAMA).read(name)
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
    return writer.close()


def test_the_tokenizer_is_copied_and_code_and_weights_beside_it_are_not(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenization_evil.py", "model.safetensors", "config.json"):
        (folder / name).write_text(name)
    nemo = open_nemo(make(tmp_path / "x.nemo", tokenizer=folder))
    assert nemo.tokenizer.names() == ["tokenizer.json", "tokenizer_config.json"]
    again = open_nemo(make(tmp_path / "y.nemo", tokenizer=nemo.path))
    assert read_small(again.tokenizer, "tokenizer.json") == b"tokenizer.json"


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
        ({"share_embeddings_and_output_weights": True}, "tensor output_layer.weight belongs to no part"),
        ({"normalization": "LayerNorm1p"}, "layer_norm_bias is missing"),
        ({"precision": "bf16"}, "are torch.float32; model_config.yaml says torch.bfloat16"),
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


def test_a_tensor_of_the_wrong_shape_or_too_few_of_them_are_never_written(tmp_path):
    whole = list(stream(source(LLAMA)))
    wrong = [*whole[:-1], (whole[-1][0], torch.zeros(2))]
    for tensors, message in ((wrong, "expected"), (whole[:-2], "and 1 more tensors did not come")):
        with pytest.raises(AssertionError, match=message):
            write_nemo(tmp_path / "x.nemo", LLAMA, tensors, dtype=torch.float32, tokenizer=None, origin=Origin("f"))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model_config.yaml", "model_weights/.metadata", "model_weights/*.distcp"])
def test_a_model_whose_manifest_does_not_vouch_for_a_file_is_refused(tmp_path, name):
    path = random_nemo(tmp_path / "a.nemo", TINY["llama"]).path
    (file,) = path.glob(name)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["files"][file.relative_to(path).as_posix()]
    (path / "manifest.json").write_text(json.dumps(manifest))
    for verify in (False, True):
        with pytest.raises(UserError, match=f"{file.name}.*") as caught:
            open_nemo(path, verify=verify)
        assert "list" in str(caught.value)
