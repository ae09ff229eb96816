"""The `run_config.yaml` that Megatron-Bridge opens a model by: it says all of the shape, and we read it back."""

import argparse
import dataclasses

import foreign_layouts as foreign
import pytest
import torch
import yaml
from in_memory import InMemory

from minitron_nemo.artefacts.contents import contents_of
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.strict_yaml import parse_yaml
from minitron_nemo.checkpoint.formats import megatron
from minitron_nemo.checkpoint.formats.bridge_config import arch_of_run_config, run_config_of
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch, RopeScaling
from minitron_nemo.testing import ALONE, LLAMA, TINY

LLAMA2 = dataclasses.replace(LLAMA, rope_scaling=None)
SCALED = dataclasses.replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192))
TIED = dataclasses.replace(
    SCALED, share_embeddings_and_output_weights=True, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192)
)
MODELS = {**TINY, "llama": LLAMA2, "llama_31": SCALED, "llama_32": TIED}
LAYOUTS = {"llama_31": Layout(tp=4, pp=2, vpp=2), "qwen3": Layout(tp=2, pp=4), "nemotron": Layout(tp=2)}

# Of each field of the shape, another value; norms on queries and keys go with RMSNorm, which SCALED has.
OTHER = {
    "num_layers": 2, "hidden_size": 56, "ffn_hidden_size": 88, "num_attention_heads": 16, "num_query_groups": 8,
    "kv_channels": 16, "vocab_size": 99, "seq_length": 256, "family": "mistral", "activation": "squared_relu",
    "normalization": "LayerNorm1p", "norm_epsilon": 1e-6, "rotary_base": 1e6, "rotary_percent": 0.5,
    "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 8192), "share_embeddings_and_output_weights": True,
    "add_qkv_bias": True, "qk_layernorm": True,
}  # fmt: skip


def described(arch, *, dtype=torch.bfloat16, layout=ALONE, tokenizer=False):
    return run_config_of(arch, dtype=dtype, layout=layout, tokenizer=tokenizer)


def read_back(folder, config, *, rows):
    (folder / "run_config.yaml").write_text(yaml.safe_dump(config))
    return arch_of_run_config(contents_of(folder), rows)[0]


def test_every_field_of_the_shape_is_said_and_read_back(tmp_path):
    """Each by itself, so none stands for another; all models name the same fields, so none rests on a default."""
    assert set(OTHER) == {field.name for field in dataclasses.fields(ModelArch)}
    for name, value in OTHER.items():
        assert getattr(SCALED, name) != value
        arch = dataclasses.replace(SCALED, **{name: value})
        assert described(arch) != described(SCALED), name
        assert read_back(tmp_path, described(arch), rows=arch.vocab_size) == arch, name
    fields = {frozenset(described(arch)["model"]) for arch in MODELS.values()}
    assert len(fields) == 1
    assert set(OTHER) - {"family", "activation", "norm_epsilon"} <= fields.pop()


@pytest.mark.parametrize("common_is_object", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_run_config_alone_gives_the_model_back(tmp_path, model, common_is_object):
    """And says what the arguments beside it say, which the folder then has no more."""
    source, layout = InMemory(MODELS[model], torch.bfloat16), LAYOUTS.get(model, ALONE)
    checkpoint = Checkpoint(tmp_path, "memory", source.arch, torch.bfloat16, source)
    out, inner = tmp_path / "out", tmp_path / "out" / "iter_0000001"
    megatron.write(
        out, checkpoint, stream(source), origin=Origin("x"), layout=layout, common_is_object=common_is_object
    )
    args = megatron.args_of(source.arch, dtype=torch.bfloat16, layout=layout)
    assert megatron.arch_of_args(vars(args), source.arch.vocab_size, source="args")[0] == source.arch
    if not common_is_object:
        torch.save({"iteration": 1}, inner / "common.pt")
    found = megatron.open_checkpoint(contents_of(out))
    assert found.arch == source.arch
    assert all(torch.equal(tensor, source.read(name)) for name, tensor in stream(found.weights))
    text = (inner / "run_config.yaml").read_bytes()
    assert yaml.safe_load(text) == parse_yaml(text) == described(source.arch, layout=layout)
    (inner / "run_config.yaml").unlink()
    if not common_is_object:
        with pytest.raises(UserError, match="neither run_config.yaml nor arguments"):
            megatron.open_checkpoint(contents_of(out))


# What the Bridge calls; functions and dtypes it looks up, and calls nothing of ours.
CALLED = ("megatron.bridge.models.gpt_provider.GPTModelProvider",
          "megatron.bridge.training.tokenizers.config.TokenizerConfig")  # fmt: skip
LOOKED_UP = ("torch.nn.functional.silu", "megatron.core.activations.squared_relu", "torch.float32", "torch.float16",
             "torch.bfloat16")  # fmt: skip


def targets(value):
    if isinstance(value, dict):
        if "_target_" in value:
            yield value["_target_"], value.get("_call_", True)
        for each in value.values():
            yield from targets(each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_bridge_is_asked_for_classes_of_its_own_alone(dtype):
    for arch in MODELS.values():
        found = dict(targets(described(arch, dtype=dtype, tokenizer=True)))
        assert {name for name, called in found.items() if called} == set(CALLED)
        assert {name for name, called in found.items() if not called} <= set(LOOKED_UP)
        assert str(dtype) in found


def test_a_run_that_goes_on_from_it_finds_what_it_asks_for():
    """Megatron-Bridge 0.6.1, `training/checkpointing.py`, `_load_checkpoint_from_path`; a tokenizer is of no place."""
    config = described(SCALED, layout=Layout(tp=4, pp=2, vpp=2), tokenizer=True)
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")
    assert [config["model"][name] for name in sizes] == [4, 2, 2]
    assert not any(config["checkpoint"][name] for name in ("save_optim", "save_rng", "fully_parallel_save"))
    assert config["tokenizer"]["tokenizer_model"] is None
    assert "tokenizer" not in described(SCALED)
    for dtype, flags in (
        (torch.bfloat16, (True, False)),
        (torch.float16, (False, True)),
        (torch.float32, (False,) * 2),
    ):
        model = described(SCALED, dtype=dtype)["model"]
        assert (model["bf16"], model["fp16"]) == flags  # the Bridge takes the dtype of the weights from these


def test_what_is_not_padded_is_not_padded_by_the_bridge():
    """Unless its tensor-parallel ranks need it (`megatron/training/vocab_utils.py`: a multiple of this times ranks)."""
    model = described(SCALED)["model"]
    assert (model["vocab_size"], model["should_pad_vocab"], model["make_vocab_size_divisible_by"]) == (131, True, 1)


def test_a_model_of_a_builder_is_read(tmp_path):
    """Megatron-Bridge's main of 2026-08-22, `models/gpt/model_config.py`: fields of layers lie one mapping deeper."""
    config = described(SCALED)
    outer = ("vocab_size", "seq_length", "share_embeddings_and_output_weights", "position_embedding_type",
             "rotary_percent", "rotary_base", "rope_scaling", "rope_scaling_factor")  # fmt: skip
    inner = {name: value for name, value in config["model"].items() if name not in outer}
    module = "megatron.bridge.models.gpt"
    built = {name: config["model"][name] for name in outer}
    built |= {"_target_": f"{module}.model_config.BridgeGPTModelConfig", "transformer": {
        **inner, "activation_func": "silu"}, "_builder_": f"{module}.gpt_builder.GPTModelBuilder"}  # fmt: skip
    assert read_back(tmp_path, {"model": built}, rows=136) == SCALED


def test_a_family_that_we_do_not_know_is_refused_by_name(tmp_path):
    for change, message in (({"minitron_family": "gpt2"}, "minitron_family='gpt2'"), ({"model": None}, "under model")):
        with pytest.raises(UserError, match=message) as error:
            read_back(tmp_path, {**described(SCALED), **change}, rows=131)
        assert "\n" not in str(error.value)


def test_layouts_are_noted_whoever_describes_the_model(tmp_path):
    source = InMemory(SCALED)
    foreign.megatron_run(tmp_path / "run", source, run_config=True)
    assert not [note for note in megatron.open_checkpoint(contents_of(tmp_path / "run")).notes if "saved by" in note]
    with foreign.common_classes():
        args = argparse.Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=4)
        torch.save({"args": args, "iteration": 1200}, tmp_path / "run/iter_0001200/common.pt")
    assert "saved by tensor 2 x pipeline 4" in megatron.open_checkpoint(contents_of(tmp_path / "run")).notes
