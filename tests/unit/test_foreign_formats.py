"""NeMo 1, NeMo 2 and Megatron-LM: what they leave is read, what is written for them is the model, bit for bit."""

import argparse
import dataclasses
import json
import re
import tarfile

import foreign_layouts as foreign
import pytest
import torch
import yaml
from hf_models import LLAMA3_ROPE, save_tiny_hf
from in_memory import InMemory

from minitron_nemo.artefacts.contents import contents_of, read_small
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.stretch import Stretch
from minitron_nemo.checkpoint.formats import megatron, nemo1, nemo2
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.formats.hf import arch_from_hf
from minitron_nemo.checkpoint.formats.tokenizer_size import tokenizer_size
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.restricted_metadata import read_metadata
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.checkpoint.state_dict_file import StateDictFile
from minitron_nemo.checkpoint.zarr_folder import ZarrTensors
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.plain_forward import PlainModel
from minitron_nemo.shape.arch import RopeScaling
from minitron_nemo.testing import LLAMA, MISTRAL, NEMOTRON, TINY

# What Megatron-Core scales rotary frequencies by is fixed but for the factor.
SCALED = dataclasses.replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
MODELS = {
    "llama": SCALED,
    "tied": dataclasses.replace(SCALED, share_embeddings_and_output_weights=True, rope_scaling=None),
    "mistral": MISTRAL,
    "nemotron": NEMOTRON,
    "qwen2": TINY["qwen2"],
    "qwen3": TINY["qwen3"],
}
UNTOLD = {"mistral": "llama"}  # what a config that names no family is taken for
MULTIHEAD = dataclasses.replace(MODELS["tied"], num_query_groups=8, share_embeddings_and_output_weights=False)


def opened(module, folder):
    contents = contents_of(folder)
    assert module.recognise(contents)
    return module.open_checkpoint(contents)


def assert_same(found, source, *, family=None):
    assert found.arch == dataclasses.replace(source.arch, family=family or source.arch.family)
    assert found.dtype == source.dtype(source.names()[0])
    for name, tensor in stream(found.weights):
        assert torch.equal(tensor, source.read(name)), name


LAYOUTS = {
    "llama": Layout(tp=4, pp=2, vpp=2),
    "tied": Layout(tp=2, pp=2),
    "mistral": Layout(),
    "nemotron": Layout(tp=4),
    "qwen2": Layout(tp=4, pp=2),
    "qwen3": Layout(tp=2, pp=4),
}


@pytest.mark.parametrize("model", MODELS)
def test_what_is_written_for_others_is_the_model(tmp_path, model):
    source, layout = InMemory(MODELS[model], torch.bfloat16), LAYOUTS[model]
    checkpoint = Checkpoint(tmp_path, "memory", source.arch, torch.bfloat16, source)
    for module in (nemo1, nemo2, megatron):
        out = tmp_path / module.NAME
        module.write(out, checkpoint, stream(source), origin=Origin("x"), layout=layout)
        assert_same(opened(module, out), source)
        assert sorted(out.rglob("*.distcp")) == sorted(
            (next(out.rglob(".metadata")).parent / f"__{rank}_0.distcp") for rank in range(layout.model_ranks)
        )
    megatron.write(tmp_path / "19", checkpoint, stream(source), origin=Origin("x"), common_is_object=True)
    assert not list((tmp_path / "19").rglob("common.pt"))
    assert_same(opened(megatron, tmp_path / "19"), source)


def test_the_file_of_a_rank_holds_what_the_rank_would(tmp_path):
    """Beside the parts that ranks of NeMo 1 have, but for the padding, which is not written."""
    source, tp, pp = InMemory(SCALED), 2, 2
    checkpoint = Checkpoint(tmp_path, "memory", source.arch, torch.float32, source)
    megatron.write(tmp_path / "out", checkpoint, stream(source), origin=Origin("x"), layout=Layout(tp=tp, pp=pp))
    stored = read_metadata(contents_of(tmp_path / "out" / "iter_0000001")).tensors
    weights = opened(megatron, tmp_path / "out").weights
    for rank in range(tp * pp):
        held = 0
        for name, tensor in foreign.chunk_of_model(source, rank // tp, pp):
            part = foreign.share(name, tensor, rank % tp, tp, True)
            layer = name.removeprefix(foreign.LAYER).split(".")[0]
            first = rank // tp * 2
            key = name.replace(f"{foreign.LAYER}{layer}.", foreign.LAYER) if name.startswith(foreign.LAYER) else name
            chunks = [chunk for chunk in stored[key].chunks if chunk.file == f"__{rank}_0.distcp"]
            if key != name:
                chunks = [chunk for chunk in chunks if chunk.offset[0] == first + int(layer)]
            if rank % tp and tensor.dim() == 1:
                assert not chunks  # what all have is written once
                continue
            found = torch.cat([weights.reader.read(key, chunk).reshape(-1, *part.shape[1:]) for chunk in chunks])
            assert torch.equal(found, part[: len(found)])
            assert len(found) == len(part) or (part[len(found) :] == 1).all()
            held += len(chunks)
        everything = [chunk for tensor in stored.values() for chunk in tensor.chunks]
        assert held == sum(chunk.file == f"__{rank}_0.distcp" for chunk in everything)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("core", ["0.16", "0.19", "bridge"])
def test_runs_of_megatron_are_read(tmp_path, model, core):
    source = InMemory(MODELS[model], torch.bfloat16)
    kind = {"run_config": True} if core == "bridge" else {"core": core}
    foreign.megatron_run(tmp_path / "run", source, **kind)
    found = opened(megatron, tmp_path / "run")
    assert_same(found, source, family=UNTOLD.get(model))
    assert {"iteration 1200", "5 rows of padding in the vocabulary"} <= set(found.notes)
    assert_same(opened(megatron, tmp_path / "run" / "iter_0001200"), source, family=found.arch.family)


@pytest.mark.parametrize("model", MODELS)
def test_folders_of_nemo_2_are_read(tmp_path, model):
    source = InMemory(MODELS[model])
    family = {"tied": "llama"}.get(model, model)
    foreign.nemo2(tmp_path / "nemo2", source, name=f"{family}.{family.title()}Model")
    (tmp_path / "nemo2/context/llama-tokenizer/tokenizer.json").write_text("{}")
    found = opened(nemo2, tmp_path / "nemo2")
    assert_same(found, source)
    assert found.tokenizer.names() == ["tokenizer.json"]


@pytest.mark.parametrize("model", MODELS)
def test_archives_of_nemo_1_are_read(tmp_path, model):
    """torch_dist of both prefixes, zarr over two ranks in bf16, the archive packed; nothing tells a Mistral."""
    source = InMemory(MODELS[model], torch.bfloat16)
    family = UNTOLD.get(model)
    foreign.write_sentencepiece(tmp_path / "zarr", 131)
    foreign.nemo1_zarr(tmp_path / "zarr", source, tp=2, tokenizer=foreign.SENTENCEPIECE)
    foreign.nemo1_torch_dist(tmp_path / "dist", source, vocab_size=131)
    foreign.nemo1_torch_dist(tmp_path / "o2", source, prefix="model.module.", megatron_amp_O2=True, vocab_size=131)
    with tarfile.open(tmp_path / "x.nemo", "w:") as tar:  # NeMo 1.23, `_make_nemo_file_from_folder`
        tar.add(tmp_path / "zarr", arcname="./")
    for name in ("zarr", "dist", "o2", "x.nemo"):
        found = opened(nemo1, tmp_path / name)
        assert_same(found, source, family=family)
        assert "NeMo 1.23.0" in found.notes
    assert opened(nemo1, tmp_path / "x.nemo").tokenizer.names() == ["tokenizer.model"]


RANKS = {
    "one": {},
    "tp2": {"tp": 2, "prefix": "model.module."},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp4_pp4": {"tp": 4, "pp": 4, "spelling": "local"},
    "tp2_pp2_vpp2": {"tp": 2, "pp": 2, "vpp": 2},
}


@pytest.mark.parametrize("model", ["llama", "tied", "nemotron", "qwen2", "qwen3"])
@pytest.mark.parametrize("ranks", RANKS)
def test_files_of_ranks_are_put_together(tmp_path, model, ranks):
    source = InMemory(MODELS[model])
    foreign.nemo1_ranks(tmp_path / "x", source, vocab_size=131, **RANKS[ranks])
    assert_same(opened(nemo1, tmp_path / "x"), source)


def test_nemo_own_layers_are_read(tmp_path):
    """Those of mcore_gpt=false, whose heads have a key each."""
    source = InMemory(MULTIHEAD, torch.float16)
    foreign.nemo1_ranks(tmp_path / "x", source, tp=2, spelling="nemo", vocab_size=131)
    assert_same(opened(nemo1, tmp_path / "x"), source)


@pytest.mark.parametrize("family", ["llama", "nemotron"])
def test_a_model_that_nemo_converted_gives_the_logits_of_hugging_face(tmp_path, family):
    """In the files of four ranks, computed by our plain forward pass."""
    from transformers import AutoModelForCausalLM

    rope = {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 8192}} if family == "llama" else {}
    hf = AutoModelForCausalLM.from_pretrained(save_tiny_hf(tmp_path / "hf", family, **rope))
    converted = foreign.ConvertedByNemo(hf.state_dict(), arch_from_hf(tmp_path / "hf"))
    foreign.nemo1_ranks(tmp_path / "nemo", converted, tp=2, pp=2, vocab_size=131)
    model = PlainModel(opened(nemo1, tmp_path / "nemo").weights)
    tokens = torch.arange(24).reshape(2, 12) * 5 % 131
    x = model.embed(tokens)
    for layer in range(converted.arch.num_layers):
        x = x + model.attention(layer, x)
        x = x + model.mlp(layer, x)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model.final_norm(x), 0, 131), hf(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("words", "found"), [(131, 131), (144, 144), (99, 144)])
def test_the_vocabulary_is_that_of_the_tokenizer_when_padding_makes_the_rows_of_it(tmp_path, words, found):
    """Two ranks pad 131 words to 144 rows, and NeMo 1 writes down neither number; 99 words it would pad to 112."""
    source = InMemory(dataclasses.replace(SCALED, vocab_size=131))
    foreign.nemo1_ranks(tmp_path / "x", source, tp=2, tokenizer=foreign.SENTENCEPIECE)
    foreign.write_sentencepiece(tmp_path / "x", words)
    assert opened(nemo1, tmp_path / "x").arch.vocab_size == found


def test_a_tokenizer_in_json_says_its_size_too(tmp_path):
    words = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 9, "content": "<s>"}]}
    for content, size in ((words, 10), ({"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}, 2), ({}, None)):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert tokenizer_size(contents_of(tmp_path)) == size


def test_a_tokenizer_goes_along(tmp_path):
    """Into the folder of each format and out again; a model of sentencepiece is an artefact of NeMo 1."""
    (tmp_path / "in").mkdir()
    foreign.write_sentencepiece(tmp_path / "in", 131)
    (tmp_path / "in" / foreign.ARTEFACT).rename(tmp_path / "in" / "tokenizer.model")
    (tmp_path / "in" / "hf_config.json").write_text("{}")
    source = InMemory(MULTIHEAD)
    given = Checkpoint(tmp_path, "memory", source.arch, torch.float32, source, contents_of(tmp_path / "in"))
    for module in (nemo1, nemo2, megatron):
        module.write(tmp_path / module.NAME, given, stream(source), origin=Origin("x"))
        tokenizer = opened(module, tmp_path / module.NAME).tokenizer
        assert tokenizer.names() == ["hf_config.json", "tokenizer.model"]
        assert read_small(tokenizer, "tokenizer.model") == (tmp_path / "in/tokenizer.model").read_bytes()
    section = yaml.safe_load((tmp_path / "nemo1/model_config.yaml").read_text())["tokenizer"]
    artefact = (tmp_path / "nemo1" / section["model"].removeprefix("nemo:")).read_bytes()
    assert artefact == (tmp_path / "in/tokenizer.model").read_bytes()


# What refuses it, what changes in the folder, what the message says.
RANK_1 = "mp_rank_01/model_weights.ckpt"


def _changed(name, value):
    def change(folder):
        state = foreign.rank_state(folder / RANK_1)
        state[name] = value(state[name]) if name in state else value(None)
        torch.save({key: tensor for key, tensor in state.items() if tensor is not None}, folder / RANK_1)

    return change


NORM, FC1 = "model.decoder.final_layernorm.weight", "model.decoder.layers.1.mlp.linear_fc1.weight"
BAD_RANKS = {
    "a rank is missing": (lambda folder: (folder / RANK_1).unlink(), "vocab_size=131: the embedding has 72 rows"),
    "the first rank is missing": (
        lambda folder: (folder / "mp_rank_00/model_weights.ckpt").unlink(),
        "tensor-parallel rank 0, pipeline stage 0 are missing",
    ),
    "two ranks have other norms": (_changed(NORM, lambda norm: norm + 1), "another copy than that of tensor-parallel"),
    "a tensor is missing": (_changed(FC1, lambda _: None), "ranks disagree: only some have decoder.layers.1"),
    "a tensor is misshapen": (_changed(FC1, lambda tensor: tensor[:-1]), "is (79, 48)"),
    "a tensor is of another dtype": (_changed(FC1, lambda tensor: tensor.half()), "torch.float16, others are"),
    "a tensor is too much": (_changed("model.decoder.x", lambda _: torch.ones(1)), "ranks disagree: only some have"),
    "a pickle names a function": (lambda folder: torch.save({"x": Canary()}, folder / RANK_1), "names posix.system"),
    "a file is cut short": (
        lambda folder: (folder / RANK_1).write_bytes((folder / RANK_1).read_bytes()[:-3000]),
        "not a readable file of torch.save",
    ),
    "a file is no zip": (lambda folder: (folder / RANK_1).write_bytes(b"\x80\x02}."), "not a readable file"),
}


class Canary:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        import os

        return os.system, ("touch canary",)


@pytest.mark.parametrize("case", BAD_RANKS)
def test_bad_files_of_ranks_are_refused_by_name(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign.nemo1_ranks(tmp_path / "x", InMemory(SCALED), tp=2, vocab_size=131)
    change, message = BAD_RANKS[case]
    change(tmp_path / "x")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        for _ in stream(opened(nemo1, tmp_path / "x").weights):
            pass
    assert "\n" not in str(error.value)
    assert not (tmp_path / "canary").exists()


def test_a_copy_of_the_tied_table_must_be_one(tmp_path):
    """The last stage has one, where the head is."""
    foreign.nemo1_ranks(tmp_path / "x", InMemory(MODELS["tied"]), pp=2, vocab_size=131)
    file = tmp_path / "x/tp_rank_00_pp_rank_001/model_weights.ckpt"
    state = foreign.rank_state(file)
    torch.save({**state, "model.output_layer.weight": state["model.output_layer.weight"] + 1}, file)
    with pytest.raises(UserError, match="another copy of embedding"):
        opened(nemo1, tmp_path / "x").weights.read("embedding.word_embeddings.weight")


def test_views_of_one_storage_are_read_from_their_places(tmp_path):
    """As ranks save them when their parameters lie in one buffer; a view by columns is refused."""
    buffer = torch.arange(24.0)
    torch.save({"a": buffer[:6].view(2, 3), "b": {"c": buffer[6:18].view(4, 3)}, "n": 1}, tmp_path / "x")
    file = StateDictFile(Stretch.whole(tmp_path / "x"), label=tmp_path / "x")
    assert file.names() == ["a", "b.c"]
    assert torch.equal(file.read("a"), buffer[:6].view(2, 3))
    assert torch.equal(file.read("b.c"), buffer[6:18].view(4, 3))
    assert torch.equal(file.read("b.c", Box((1, 1), (2, 2))), buffer[6:18].view(4, 3)[1:3, 1:3])
    torch.save({"a": buffer.view(4, 6).T}, tmp_path / "y")
    with pytest.raises(UserError, match="a tensor is no contiguous one"):
        StateDictFile(Stretch.whole(tmp_path / "y"), label=tmp_path / "y")


CHUNK = "model_weights/model.decoder.layers.mlp.linear_fc2.weight/1.0.0"
BAD_ZARR = {
    "compressed": ({"compressor": {"id": "blosc"}}, "only arrays without compressor"),
    "filtered": ({"filters": [{"id": "delta"}]}, "only arrays without compressor and filters"),
    "by columns": ({"order": "F"}, "supported are order C"),
    "of another dtype": ({"dtype": "<V2"}, "supported are order C and"),
    "of another version": ({"zarr_format": 3}, "zarr_format=3"),
    "without end": ({"shape": [2**40, 48, 80]}, "there are not so many files"),
    "without sizes": ({"chunks": [0, 48, 80]}, "must describe a grid"),
}


@pytest.mark.parametrize("case", [*BAD_ZARR, "a chunk is missing", "a chunk is cut short"])
def test_bad_zarr_is_refused_by_name(tmp_path, case):
    foreign.nemo1_zarr(tmp_path / "x", InMemory(SCALED), vocab_size=131)
    if case in BAD_ZARR:
        change, message = BAD_ZARR[case]
        described = (tmp_path / "x" / CHUNK).parent / ".zarray"
        described.write_text(json.dumps({**json.loads(described.read_text()), **change}))
    elif case == "a chunk is missing":
        (tmp_path / "x" / CHUNK).unlink()
        message = "1.0.0: the chunk is missing"
    else:
        (tmp_path / "x" / CHUNK).write_bytes(b"1234")
        message = "1.0.0: the chunk has 4 bytes, not 15360"
    with pytest.raises(UserError, match=re.escape(message)):
        opened(nemo1, tmp_path / "x")


def test_a_chunk_at_the_border_of_a_zarr_array_is_stored_whole(tmp_path):
    """As the specification has it: what lies beyond the array is in its file and not in the array."""
    described = {"zarr_format": 2, "shape": [3, 3], "chunks": [2, 2], "dtype": "<f4", "order": "C", "compressor": None}
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / ".zarray").write_text(json.dumps({**described, "filters": None, "fill_value": None}))
    padded = torch.arange(16.0).view(4, 4)
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        chunk = padded[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        (tmp_path / "x" / f"{row}.{column}").write_bytes(chunk.contiguous().numpy().tobytes())
    array = ZarrTensors(contents_of(tmp_path))
    array.check_whole(array.keys())
    assert torch.equal(array.read("x"), padded[:3, :3])
    assert torch.equal(array.read("x", Box((1, 1), (2, 1))), padded[1:3, 1:2])


def built(graph, value):
    """The calls of a graph as nested dicts: what Fiddle would build of it, by the names of what is called."""
    if value["type"] == "leaf":
        return value["value"]
    if value["type"] == "pyref":
        return f"{value['module']}.{value['name']}"
    config = graph["objects"][value["key"]]
    traversed, arguments = (
        {name.split("'")[1]: each for name, each in described["items"]}
        for described in (graph["objects"][config["metadata"]["key"]], config)
    )
    names = [name for _, name in graph["objects"][traversed["argument_names"]["key"]]["items"]]
    assert names == list(arguments)
    return {"_target_": built(graph, traversed["fn_or_cls"]), **{k: built(graph, v) for k, v in arguments.items()}}


def test_the_graph_that_nemo_2_builds_is_what_its_yaml_says(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    source = InMemory(LLAMA)
    given = Checkpoint(tmp_path, "memory", LLAMA, torch.float32, source, contents_of(tmp_path / "in"))
    nemo2.write(tmp_path / "out", given, stream(source), origin=Origin("x"))
    described = yaml.safe_load((tmp_path / "out/context/model.yaml").read_text())
    graph = json.loads((tmp_path / "out/context/io.json").read_text())
    model = built(graph, graph["root"])["model"]
    assert model["config"].pop("activation_func") == described["config"].pop("activation_func")["_target_"]
    assert described["config"].pop("minitron_family") == "llama"
    assert model == described
    assert model["config"]["old_context_len"] == 32
    text = json.dumps([graph["root"], graph["objects"]])
    assert graph["refcounts"] == {key: text.count(f'"key": "{key}"') for key in graph["objects"]}


# Fields that ask for what is not supported: each is named as its source spells it.
BAD_NEMO1 = {
    "bias": True, "activation": "gelu", "normalization": "layernorm", "position_embedding_type": "learned_absolute",
    "seq_len_interpolation_factor": 2.0, "transformer_block_type": "post_ln", "num_moe_experts": 8, "name": "modelopt",
    "rotary_percentage": 1.5, "rotary_base": "many", "encoder_seq_length": None, "hidden_size": True,
    "headscale": True, "normalize_attention_scores": False, "window_size": [64, 0], "add_qkv_bias": "yes",
    "openai_gelu": True, "mcore_customization_config": {"x": 1}, "override_vocab_size": 200, "num_query_groups": 3,
    "minitron_family": "gpt2",
}  # fmt: skip
BAD_ARGS = {
    "add_bias_linear": True, "swiglu": False, "normalization": "LayerNorm", "position_embedding_type": "yarn",
    "rotary_seq_len_interpolation_factor": 4, "num_experts": 8, "multi_latent_attention": True, "spec": ["a", "b"],
    "is_hybrid_model": True, "mtp_num_layers": 1, "softmax_type": "learnable", "rotary_interleaved": True,
    "norm_epsilon": -1.0, "qk_l2_norm": True, "use_rope_scaling": "yes",
}  # fmt: skip
BAD_NEMO2 = {
    "add_bias_linear": True, "gated_linear_unit": False, "layernorm_zero_centered_gamma": True, "vocab_size": 500,
    "softmax_scale": 0.5, "scale_factor": "8", "old_context_len": 1.5, "window_size": [4, 0], "num_layers": 0,
    "share_embeddings_and_output_weights": "no", "heterogeneous_block_specs": True, "kv_channels": "8",
    "ffn_hidden_size": 80.0, "glu_linear_offset": 1.0, "attention_output_gate": True,
}  # fmt: skip


def test_fields_that_are_not_supported_are_refused_by_their_own_names(tmp_path):
    """In the place of each the folder as it was is read, so it is the field that is refused."""
    source = InMemory(SCALED)
    foreign.nemo1_torch_dist(tmp_path / "nemo1", source, vocab_size=131)
    foreign.nemo2(tmp_path / "nemo2", source)
    for name, value in BAD_NEMO1.items():
        foreign.write_nemo1_config(tmp_path / "nemo1", SCALED, **{"vocab_size": 131, name: value})
        with pytest.raises(UserError, match=f"(model_config.yaml: )?{name.replace('override_', '')}="):
            opened(nemo1, tmp_path / "nemo1")
    for name, value in BAD_NEMO2.items():
        config = foreign.transformer_config(SCALED, "x.LlamaConfig", **{name: value})
        (tmp_path / "nemo2/context/model.yaml").write_text(yaml.safe_dump({"config": config}))
        shown = {"gated_linear_unit": "activation_func", "layernorm_zero_centered_gamma": "normalization"}
        with pytest.raises(UserError, match=f"{shown.get(name, name)}="):
            opened(nemo2, tmp_path / "nemo2")
    for name, value in BAD_ARGS.items():
        args = vars(foreign.megatron_args(SCALED, **{name: value}))
        with pytest.raises(UserError, match=f"args: {name}="):
            megatron.arch_of_args(args, 136, source="args")


def test_what_a_format_cannot_say_is_not_written(tmp_path):
    """Llama-3 scaling of another original length, and of another factor in NeMo 1."""
    for arch, modules in ((LLAMA, (megatron, nemo1)), (dataclasses.replace(SCALED, rope_scaling=RopeScaling(
        32.0, 1.0, 4.0, 8192)), (nemo1,))):  # fmt: skip
        source = InMemory(arch)
        checkpoint = Checkpoint(tmp_path, "memory", arch, torch.float32, source)
        for module in modules:
            with pytest.raises(UserError, match="rope_scaling"):
                module.write(tmp_path / "out", checkpoint, stream(source), origin=Origin("x"))
    assert not (tmp_path / "out").exists()


def _saved(state):
    def change(folder):
        torch.save(state, folder / "iter_0001200/common.pt")

    return change


BAD_RUNS = {
    "the common state names a function": (_saved({"args": Canary()}), "names posix.system"),
    "the common state is no dict": (_saved(["args"] * 2), "it holds list"),
    "the common state is no file of torch": (
        lambda folder: (folder / "iter_0001200/common.pt").write_bytes(b"\x80\x02}."),
        "not the common state of a checkpoint",
    ),
    "no arguments": (_saved({"iteration": 1}), "neither run_config.yaml nor arguments"),
    "arguments of no shape": (_saved({"args": argparse.Namespace(num_layers=4)}), "position_embedding_type=None"),
    "another number of layers": (_saved({"args": foreign.megatron_args(SCALED, num_layers=5)}), "its arguments says"),
    "no iteration": (lambda folder: (folder / megatron.LATEST_FILE).write_text("../x"), "must be the number of an"),
    "another iteration": (lambda folder: (folder / megatron.LATEST_FILE).write_text("7"), "there is no iter_0000007"),
}


@pytest.mark.parametrize("case", BAD_RUNS)
def test_bad_runs_are_refused_in_one_line(tmp_path, case, monkeypatch):
    monkeypatch.chdir(tmp_path)
    foreign.megatron_run(tmp_path / "x", InMemory(SCALED))
    change, message = BAD_RUNS[case]
    with foreign.common_classes():
        change(tmp_path / "x")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        opened(megatron, tmp_path / "x")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "canary").exists()


def test_what_is_described_otherwise_is_told_what_to_give(tmp_path):
    legacy, bare, hf = tmp_path / "legacy", tmp_path / "bare", tmp_path / "hf"
    for file in (legacy / "mp_rank_00/model_optim_rng.pt", bare / "context/io.json", bare / "weights/.metadata",
                 hf / "context/model.yaml", hf / "hf_weights/config.json"):  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    for module, folder, message in ((megatron, legacy, "save it again as torch_dist"), (nemo2, bare, "no model.yaml"),
                                    (nemo2, hf, "hf_weights itself")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            opened(module, folder)
