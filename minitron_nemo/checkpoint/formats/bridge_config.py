"""`run_config.yaml` of Megatron-Bridge: the model that it builds from an iteration, beside what Megatron-LM needs.

Source: Megatron-Bridge 0.6.1 (tag v0.6.0) and its main of August 2026, `training/model_load_save.py`,
`training/checkpointing.py`, `utils/instantiate_utils.py` and `models/gpt_provider.py`.
"""

from collections.abc import Mapping
from typing import Any

import torch

from minitron_nemo.artefacts.contents import Contents
from minitron_nemo.checkpoint.formats.foreign_yaml import function_name, read_yaml_mapping
from minitron_nemo.checkpoint.formats.megatron_config import (
    FAMILY,
    ModelFields,
    arch_of,
    core_fields,
    llama31_factor,
    rope_scaling_of,
    vocabulary,
)
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

RUN_CONFIG_FILE = "run_config.yaml"

# The class under every one of the Bridge's models. It lies at this place from 0.2 on and scales rotary frequencies from
# 0.3 on; classes of the families went with 0.4, but for Mistral's, which fills in a model of 7B and computes the same.
PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
TOKENIZER_CONFIG = "megatron.bridge.training.tokenizers.config.TokenizerConfig"
FUNCTIONS = {"swiglu": "torch.nn.functional.silu", "squared_relu": "megatron.core.activations.squared_relu"}


def _itself(name: str) -> dict[str, Any]:
    """A function or dtype, not what it gives when it is called."""
    return {"_target_": name, "_call_": False}


def run_config_of(arch: ModelArch, *, dtype: torch.dtype, layout: Layout, tokenizer: bool) -> dict[str, Any]:
    """What the Bridge reads of a run; UserError for a rotary scaling that it cannot be told.

    Megatron-LM cannot be told it either, as both leave it to Megatron-Core: whoever opens a folder, the other can. How
    a run trains is left out, and so is the class of the whole, which asks for all of it. How fast layers compute
    (fusions, Transformer Engine) is left to the Bridge.
    """
    factor = llama31_factor(arch, target="Megatron-Bridge")
    model = {
        "_target_": PROVIDER,
        **core_fields(arch),
        "activation_func": _itself(FUNCTIONS[arch.activation]),
        "rope_scaling": factor is not None,
        "rope_scaling_factor": 1.0 if factor is None else factor,
        # Words that tensor-parallel ranks can share out evenly get no padding, and one rank never has any.
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": 1,
        "apply_query_key_layer_scaling": False,
        "multi_latent_attention": False,
        "params_dtype": _itself(str(dtype)),
        "pipeline_dtype": _itself(str(dtype)),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
    }
    # Asked for when a run goes on from here. Without `save_optim` and `save_rng` it looks for neither.
    checkpoint = {"ckpt_format": "torch_dist", "save_optim": False, "save_rng": False, "fully_parallel_save": False}
    config = {FAMILY: arch.family, "model": model, "checkpoint": checkpoint}
    if tokenizer:
        # It lies in `tokenizer/`, but a relative path is looked up in the working directory, and then on the hub.
        words = {"_target_": TOKENIZER_CONFIG, "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": None}
        config["tokenizer"] = words
    return config


def arch_of_run_config(contents: Contents, rows: int) -> tuple[ModelArch, tuple[str, ...]]:
    """The shape that `run_config.yaml` describes, whose embedding has so many rows, and what to note of it."""
    source = str(contents.path / RUN_CONFIG_FILE)
    config = read_yaml_mapping(contents, RUN_CONFIG_FILE)
    values = config.get("model")
    if not isinstance(values, dict):
        raise UserError(f"{source}: no mapping under model; it must describe one")
    values = {FAMILY: config.get(FAMILY), **_flat(values)}
    values["activation_func"] = function_name(values.get("activation_func"))
    fields = ModelFields(values, source=source)
    words, notes = vocabulary(rows, values.get("vocab_size"), source=source)
    family = "mistral" if "mistral" in str(values.get("_target_", "")).lower() else ""
    return arch_of(fields, vocab_size=words, rope_scaling=rope_scaling_of(fields), family=family), notes


def _flat(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model: builders, which take the place of providers, keep those of the layers in a mapping."""
    inner = model.get("transformer")
    return {**(inner if isinstance(inner, dict) else {}), **model}
