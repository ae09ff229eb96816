"""Checkpoints as NeMo 1, NeMo 2 and Megatron-LM leave them, made without code of theirs or of our writers.

Each function says from which release it has its facts. How ranks share a tensor is written out here once more, and
torch_dist folders are made by torch itself: what rests on this must not rest on what it checks.
"""

import argparse
import contextlib
import enum
import io
import json
import sys
import types
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import yaml
from torch.distributed import checkpoint as dcp

LAYER = "decoder.layers."
# NeMo 1.23, `megatron_gpt_model.py` of mcore_gpt=false, against the names of Megatron-Core.
NEMO_NAMES = {
    "embedding.word_embeddings.weight": "language_model.embedding.word_embeddings.weight",
    "decoder.final_layernorm.": "language_model.encoder.final_layernorm.",
    "output_layer.weight": "language_model.output_layer.weight",
    "decoder.layers.": "language_model.encoder.layers.",
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.linear_qkv.": "self_attention.query_key_value.",
    "self_attention.linear_proj.": "self_attention.dense.",
    "mlp.linear_fc1.layer_norm_": "post_attention_layernorm.",
    "mlp.linear_fc1.": "mlp.dense_h_to_4h.",
    "mlp.linear_fc2.": "mlp.dense_4h_to_h.",
}
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def share(name, tensor, rank, tp, gated):
    """A tensor-parallel rank's part of a logical tensor, the vocabulary padded with ones to a multiple of 8 x tp.

    Megatron-Core 0.5 and 0.16: columns of projections back, rows of those forth; of a gate, [gate; up] of the rank.
    """
    if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = -(-len(tensor) // (8 * tp)) * 8 * tp
        tensor = torch.cat((tensor, torch.ones(rows - len(tensor), *tensor.shape[1:], dtype=tensor.dtype)))
        return tensor.chunk(tp)[rank].clone()
    if name.endswith("linear_fc1.weight") and gated:
        return torch.cat([half.chunk(tp)[rank] for half in tensor.chunk(2)])
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight")):
        return tensor.chunk(tp)[rank].clone()
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(tp, dim=1)[rank].clone()
    return tensor.clone()


def respelled(name, spelling):
    for ours, theirs in {"mcore": {}, "local": LOCAL_NAMES, "nemo": NEMO_NAMES}[spelling].items():
        name = name.replace(ours, theirs)
    return name


def chunk_of_model(source, number, chunks):
    """(name with its layer counted within the chunk, tensor) of one of the chunks of the model in forward order."""
    arch, size = source.arch, source.arch.num_layers // chunks
    tied = arch.share_embeddings_and_output_weights
    for name in source.names():
        if name.startswith(LAYER):
            layer, rest = name.removeprefix(LAYER).split(".", 1)
            if int(layer) // size == number:
                yield f"{LAYER}{int(layer) % size}.{rest}", source.read(name)
        elif number == (0 if name.startswith("embedding") else chunks - 1):
            yield name, source.read(name)
    if tied and number == chunks - 1 > 0:
        yield "output_layer.weight", source.read("embedding.word_embeddings.weight")


class ConvertedByNemo:
    """NeMo 1.23, `convert_hf_llama_to_nemo.py`: a state dict of Hugging Face's Llama or Nemotron under NeMo's names.

    Heads are interleaved by query group [queries, key, value], gate and up rows lie one after the other.
    """

    def __init__(self, state, arch):
        self.arch, heads = arch, arch.num_attention_heads // arch.num_query_groups
        self.state = {"embedding.word_embeddings.weight": state["model.embed_tokens.weight"]}
        for layer in range(arch.num_layers):
            theirs, ours = f"model.layers.{layer}.", f"{LAYER}{layer}."
            parts = []
            q, k, v = (state[f"{theirs}self_attn.{name}_proj.weight"].split(arch.kv_channels) for name in "qkv")
            for group in range(arch.num_query_groups):
                parts += [*q[group * heads : (group + 1) * heads], k[group], v[group]]
            gate = [state[f"{theirs}mlp.gate_proj.weight"]] if arch.is_gated else []
            for part in ("weight", "bias")[: 1 + arch.has_norm_bias]:
                for norm, linear in (("input", "self_attention.linear_qkv"), ("post_attention", "mlp.linear_fc1")):
                    self.state[f"{ours}{linear}.layer_norm_{part}"] = state[f"{theirs}{norm}_layernorm.{part}"]
                self.state[f"decoder.final_layernorm.{part}"] = state[f"model.norm.{part}"]
            self.state[f"{ours}self_attention.linear_qkv.weight"] = torch.cat(parts)
            self.state[f"{ours}self_attention.linear_proj.weight"] = state[f"{theirs}self_attn.o_proj.weight"]
            self.state[f"{ours}mlp.linear_fc1.weight"] = torch.cat([*gate, state[f"{theirs}mlp.up_proj.weight"]])
            self.state[f"{ours}mlp.linear_fc2.weight"] = state[f"{theirs}mlp.down_proj.weight"]
        self.state["output_layer.weight"] = state["lm_head.weight"]

    def names(self):
        return list(self.state)

    def read(self, name):
        return self.state[name]


def nemo1_config(arch, **fields):
    """NeMo 1.23, `megatron_llama_config.yaml`, as `to_config_file` leaves it in an archive."""
    return {
        "mcore_gpt": True, "micro_batch_size": 4, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None, "encoder_seq_length": arch.seq_length,
        "max_position_embeddings": arch.seq_length, "num_layers": arch.num_layers, "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size, "num_attention_heads": arch.num_attention_heads,
        "init_method_std": 0.02, "hidden_dropout": 0.0, "attention_dropout": 0.0, "kv_channels": arch.kv_channels,
        "apply_query_key_layer_scaling": True, "normalization": {"RMSNorm": "rmsnorm"}.get(arch.normalization,
        "layernorm1p"), "layernorm_epsilon": arch.norm_epsilon, "make_vocab_size_divisible_by": 8,
        "pre_process": True, "post_process": True, "bias": False, "add_qkv_bias": arch.add_qkv_bias,
        "qk_layernorm": arch.qk_layernorm,
        "activation": "fast-swiglu" if arch.is_gated else "squared-relu", "headscale": False,
        "transformer_block_type": "pre_ln", "openai_gelu": False, "normalize_attention_scores": True,
        "position_embedding_type": "rope", "rotary_percentage": arch.rotary_percent, "attention_type": "multihead",
        "share_embeddings_and_output_weights": arch.share_embeddings_and_output_weights,
        "num_query_groups": arch.num_query_groups, "tokenizer": {"library": "sentencepiece", "type": None,
        "model": None, "vocab_file": None, "merge_file": None}, "megatron_amp_O2": False, "seed": 1234,
        "precision": "bf16", "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model."
        "MegatronGPTModel", "nemo_version": "1.23.0", "rotary_base": int(arch.rotary_base),
        "scale_positional_embedding": arch.rope_scaling is not None, **fields,
    }  # fmt: skip


def write_nemo1_config(folder, arch, **fields):
    (folder / "model_config.yaml").write_text(yaml.safe_dump(nemo1_config(arch, **fields)))


ARTEFACT = f"{'0a' * 16}_tokenizer.model"  # NeMo 1.23, `_handle_artifacts`: 32 hex digits and the name of the file
SENTENCEPIECE = {"library": "sentencepiece", "type": None, "model": f"nemo:{ARTEFACT}", "vocab_file": None}


def write_sentencepiece(folder, words):
    """The artefact that `SENTENCEPIECE` names: pieces are field 1 of sentencepiece's ModelProto, 2 holds settings."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [b"\x0a\x09\x0a\x02w" + bytes([65 + word % 26]) + b"\x15\x00\x00\x80\x3f" for word in range(words)]
    (folder / ARTEFACT).write_bytes(b"".join(pieces) + b"\x12\x02\x18\x01")


def nemo1_ranks(folder, source, *, tp=1, pp=1, vpp=1, spelling="mcore", prefix="model.", **fields):
    """NeMo 1.23, `NLPSaveRestoreConnector.save_to` and `inject_model_parallel_rank`: a file for each rank."""
    folder.mkdir(parents=True)
    for rank in range(tp):
        for stage in range(pp):
            state = OrderedDict()
            for chunk in range(vpp):
                start = f"model_{chunk}.{prefix}" if vpp > 1 else prefix
                for name, tensor in chunk_of_model(source, chunk * pp + stage, pp * vpp):
                    state[start + respelled(name, spelling)] = share(name, tensor, rank, tp, source.arch.is_gated)
                    if name.endswith("linear_fc2.weight"):  # Transformer Engine keeps something there
                        state[start + name.replace("weight", "_extra_state")] = io.BytesIO(b"te")
            state[f"{prefix}rotary_pos_emb.inv_freq"] = torch.ones(4)
            inner = f"mp_rank_{rank:02d}" if pp == 1 else f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
            inner = inner if tp * pp > 1 else ""
            (folder / inner).mkdir(exist_ok=True)
            torch.save(state, folder / inner / "model_weights.ckpt")
    degrees = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    write_nemo1_config(folder, source.arch, mcore_gpt=spelling != "nemo", **{**degrees, **fields})


def rank_state(file):
    """The tensors of such a file, and what Transformer Engine keeps among them."""
    with torch.serialization.safe_globals([io.BytesIO]):
        return torch.load(file, weights_only=True)


def stacked(source, *, prefix="", vocabulary=1):
    """Tensors by the keys of a Megatron checkpoint, layers stacked; the vocabulary padded to a multiple with ones."""
    tensors: dict[str, list] = {}
    for name in source.names():
        key, tensor = name, source.read(name)
        if name.startswith(LAYER):
            key = LAYER + name.removeprefix(LAYER).split(".", 1)[1]
        elif len(tensor) == source.arch.vocab_size and tensor.dim() == 2:
            rows = -(-len(tensor) // vocabulary) * vocabulary
            tensor = torch.cat((tensor, torch.ones(rows - len(tensor), *tensor.shape[1:], dtype=tensor.dtype)))
        tensors.setdefault(prefix + key, []).append(tensor)
    return {key: torch.stack(t) if key.startswith(prefix + LAYER) else t[0] for key, t in tensors.items()}


def torch_dist(folder, tensors, *, common=None, core="0.16"):
    """Megatron-Core 0.16.1 and 0.19.0, `dist_checkpointing/serialization.py`: torch's own format and `metadata.json`.

    The common state is `common.pt`, in 0.19 an object of the name `common_state/shard_0_1`. A run keeps the optimizer's
    tensors, random states and the scales of Transformer Engine there too.
    """
    folder.mkdir(parents=True)
    beside = {
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(3),
        "rng_state/shard_0.0_1.1": [b"state"],
        "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4": [io.BytesIO(b"te")],
    }
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    state = {**tensors, **beside}
    with common_classes():
        if core == "0.19":
            state["common_state/shard_0_1"] = [common or {}]
        else:
            config |= {"common_backend": "torch", "common_backend_version": 1}
            torch.save(common or {}, folder / "common.pt")
        writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=False)
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps(config))


class AttnBackend(enum.Enum):
    """Megatron-Core 0.16.1, `transformer/enums.py`: in the arguments of every run."""

    auto = 5


AttnBackend.__module__ = "megatron.core.transformer.enums"


@contextlib.contextmanager
def common_classes():
    """What arguments hold can be pickled under its name, whether Megatron is there or not."""
    module = types.ModuleType("megatron.core.transformer.enums")
    module.AttnBackend = AttnBackend
    with mock.patch.dict(sys.modules, {module.__name__: module}):
        yield


def megatron_args(arch, **fields):
    """Megatron-LM core_v0.16.1, `training/arguments.py`: the arguments of a run, some of several hundred."""
    return argparse.Namespace(**{
        "num_layers": arch.num_layers, "hidden_size": arch.hidden_size, "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads, "group_query_attention": True, "num_query_groups":
        arch.num_query_groups, "kv_channels": arch.kv_channels, "seq_length": 32, "max_position_embeddings":
        arch.seq_length, "position_embedding_type": "rope", "add_position_embedding": True, "rotary_base":
        int(arch.rotary_base), "rotary_percent": arch.rotary_percent, "rotary_interleaved": False, "use_rope_scaling":
        arch.rope_scaling is not None, "rope_scaling_factor": 8.0, "rotary_seq_len_interpolation_factor": None,
        "add_bias_linear": False, "add_qkv_bias": arch.add_qkv_bias, "qk_layernorm": arch.qk_layernorm,
        "swiglu": arch.is_gated, "squared_relu": not arch.is_gated,
        "normalization": "LayerNorm" if arch.has_norm_bias else "RMSNorm",
        "apply_layernorm_1p": arch.has_norm_bias, "norm_epsilon": arch.norm_epsilon,
        "untie_embeddings_and_output_weights": not arch.share_embeddings_and_output_weights, "num_experts": None,
        "multi_latent_attention": False, "is_hybrid_model": False, "mtp_num_layers": None, "softmax_type": "vanilla",
        "window_size": None, "spec": None, "heterogeneous_layers_config_path": None, "vocab_size": arch.vocab_size,
        "make_vocab_size_divisible_by": 8, "padded_vocab_size": 136, "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1, "params_dtype": torch.bfloat16, "attention_backend": AttnBackend.auto,
        "save": Path("/runs/x"), "consumed_train_samples": 512, **fields,
    })  # fmt: skip


def megatron_run(folder, source, *, core="0.16", run_config=False, **fields):
    """Megatron-LM core_v0.16.1, `training/checkpointing.py`; with `run_config` Megatron-Bridge 0.6.0, without args."""
    common = {"iteration": 1200, "checkpoint_version": 3.0, "opt_param_scheduler": {"max_lr": 1e-4},
              "rerun_state_machine": {"mode": np.array([1, 2])}}  # fmt: skip
    if not run_config:
        common["args"] = megatron_args(source.arch, **fields)
    inner = folder / "iter_0001200"
    torch_dist(inner, stacked(source, vocabulary=8), common=common, core=core)
    (folder / "latest_checkpointed_iteration.txt").write_text("1200")
    if run_config:
        model = transformer_config(source.arch, "megatron.bridge.models.gpt_provider.GPTModelProvider", **fields)
        del model["scale_factor"]
        model |= {"rope_scaling": source.arch.rope_scaling is not None, "rope_scaling_factor": 8.0}
        (inner / "run_config.yaml").write_text(yaml.safe_dump({"_target_": "ConfigContainer", "model": model}))


def transformer_config(arch, target, **fields):
    """Fields of `TransformerConfig` and of NeMo 2.2's `GPTConfig`, defaults included, as both write them to YAML."""
    function = "torch.nn.functional.silu" if arch.is_gated else "nemo.collections.llm.fn.activation.squared_relu"
    scaling = arch.rope_scaling
    return {
        "_target_": target, "num_layers": arch.num_layers, "hidden_size": arch.hidden_size, "num_attention_heads":
        arch.num_attention_heads, "num_query_groups": arch.num_query_groups, "ffn_hidden_size": arch.ffn_hidden_size,
        "kv_channels": arch.kv_channels, "hidden_dropout": 0.0, "fp32_residual_connection": False, "layernorm_epsilon":
        arch.norm_epsilon, "layernorm_zero_centered_gamma": arch.has_norm_bias, "add_bias_linear": False,
        "add_qkv_bias": arch.add_qkv_bias, "gated_linear_unit": arch.is_gated, "activation_func": {"_target_": function,
        "_call_": False}, "num_moe_experts": None, "rotary_interleaved": False, "window_size": None, "normalization":
        "LayerNorm" if arch.has_norm_bias else "RMSNorm", "qk_layernorm": arch.qk_layernorm,
        "multi_latent_attention": False,
        "share_embeddings_and_output_weights": arch.share_embeddings_and_output_weights,
        "make_vocab_size_divisible_by": 8, "position_embedding_type": "rope", "rotary_base": int(arch.rotary_base),
        "rotary_percent": arch.rotary_percent, "seq_len_interpolation_factor": None, "seq_length": arch.seq_length,
        "scale_factor": scaling and scaling.factor, "low_freq_factor": scaling and scaling.low_freq_factor,
        "high_freq_factor": scaling and scaling.high_freq_factor, "old_context_len": scaling and
        scaling.original_max_position_embeddings, "vocab_size": arch.vocab_size, **fields,
    }  # fmt: skip


def nemo2(folder, source, *, name="llama.LlamaModel", **fields):
    """NeMo 2.2, `lightning/io/mixin.py` (`io_dump`) and `ckpt_utils.py`: `weights/` and `context/`."""
    torch_dist(folder / "weights", stacked(source, prefix="module.", vocabulary=8), common={"global_step": 9})
    context = folder / "context"
    (context / "llama-tokenizer").mkdir(parents=True)
    config = transformer_config(source.arch, "nemo.collections.llm.gpt.model.llama.Llama31Config", **fields)
    model = {"_target_": f"nemo.collections.llm.gpt.model.{name}", "config": config, "optim": None,
             "tokenizer": {"_target_": "AutoTokenizer", "pretrained_model_name": "llama-tokenizer"}}  # fmt: skip
    (context / "model.yaml").write_text(yaml.safe_dump(model))
    (context / "io.json").write_text('{"root": {"type": "ref", "key": "trainer_context_1"}}')
    (context / "4f0c").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")  # a pickled artefact: never opened


def nemo1_torch_dist(folder, source, *, prefix="model.", **fields):
    """NeMo 1.23 with mcore_gpt=true: `model_weights/`; `prefix` is `model.module.` with megatron_amp_O2."""
    torch_dist(folder / "model_weights", stacked(source, prefix=prefix, vocabulary=8))
    write_nemo1_config(folder, source.arch, **fields)


def nemo1_zarr(folder, source, *, tp=1, bfloat16="bfloat16", **fields):
    """Megatron-Core 0.5.0, `strategies/zarr.py`: an array for each key, a chunk for each layer and rank, uncompressed.

    The gate and the up rows of a layer are chunks of their own; bfloat16 is a dtype of Megatron's own.
    """
    spellings = {torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: bfloat16}
    for key, tensor in stacked(source, prefix="model.", vocabulary=8 * tp).items():
        array = folder / "model_weights" / key
        array.mkdir(parents=True)
        chunk = list(tensor.shape)
        if key.startswith("model." + LAYER):
            chunk[0] = 1
        split = {"fc1.weight": 1, "qkv.weight": 1, "proj.weight": 2, "fc2.weight": 2, "embeddings.weight": 0}
        for ending, dim in {**split, "output_layer.weight": 0}.items():
            if key.endswith(ending):
                chunk[dim] //= tp * (2 if ending == "fc1.weight" and source.arch.is_gated else 1)
        described = {"chunks": chunk, "compressor": None, "dtype": spellings[tensor.dtype], "fill_value": None,
                     "filters": None, "order": "C", "shape": list(tensor.shape), "zarr_format": 2}  # fmt: skip
        (array / ".zarray").write_text(json.dumps(described))
        bits = tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32).numpy()
        for index in np.ndindex(*(size // step for size, step in zip(tensor.shape, chunk, strict=True))):
            part = bits[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))]
            (array / ".".join(map(str, index))).write_bytes(part.tobytes())
    torch.save({}, folder / "model_weights" / "common.pt")
    (folder / "model_weights" / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    write_nemo1_config(folder, source.arch, **{"tensor_model_parallel_size": tp, **fields})
