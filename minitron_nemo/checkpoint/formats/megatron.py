"""Checkpoints of Megatron-LM and Megatron-Bridge: folders `iter_XXXXXXX` with their weights as torch_dist.

The model is described by the arguments of the run, in the common state, or by the Bridge's `run_config.yaml`. Both are
read as data. What a run keeps besides its weights is passed over.
"""

import argparse
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import yaml
from torch import Tensor

from minitron_nemo.artefacts.contents import Contents, has, read_small
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.checkpoint.common_state import common_state, fields_of
from minitron_nemo.checkpoint.formats.bridge_config import RUN_CONFIG_FILE, arch_of_run_config, run_config_of
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.formats.megatron_config import (
    FAMILY,
    ModelFields,
    arch_of,
    llama31_factor,
    padded,
    scaled_by,
    vocabulary,
)
from minitron_nemo.checkpoint.formats.nemo import TOKENIZER, copy_tokenizer
from minitron_nemo.checkpoint.restricted_metadata import METADATA_FILE
from minitron_nemo.checkpoint.torch_dist import COMMON_FILE, TorchDistReader
from minitron_nemo.checkpoint.torch_dist_weights import StackedWeights, vocabulary_rows, write_stream
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

NAME = "megatron"
LATEST_FILE = "latest_checkpointed_iteration.txt"
ITERATION = 1  # of what is written: Megatron-LM takes none below
LEGACY_FILE = re.compile(r"(.*/)?mp_rank_\d\d(_\d\d\d)?/(model_optim_rng|model_rng)\.pt", re.ASCII)
VOCABULARY_MULTIPLE = 128  # Megatron-LM's own default

# How Megatron-LM spells fields of Megatron-Core; releases differ, so a name may stand for one that is absent.
ARGUMENT_NAMES = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "num_moe_experts": "num_experts",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "seq_length": "max_position_embeddings",
}


def recognise(contents: Contents) -> bool:
    """Whether this is an iteration of Megatron-LM or the Bridge, or the folder of a run that has some."""
    return has(contents, LATEST_FILE) or has(contents, METADATA_FILE) or _is_legacy(contents)


def _is_legacy(contents: Contents) -> bool:
    return any(LEGACY_FILE.fullmatch(name) for name in contents.names())


def open_checkpoint(contents: Contents) -> Checkpoint:
    """The checkpoint, its shape, keys, dtype and file sizes checked; UserError in one line for anything else."""
    contents = _iteration(contents)
    if not has(contents, METADATA_FILE) and _is_legacy(contents):
        raise UserError(f"{contents.path}: files of one rank each (ckpt_format=torch); save it again as torch_dist")
    reader = TorchDistReader(contents)
    state = common_state(contents, reader.objects)
    rows = vocabulary_rows(reader)
    args = fields_of((state or {}).get("args"))
    if has(contents, RUN_CONFIG_FILE):
        source, (arch, notes) = RUN_CONFIG_FILE, arch_of_run_config(contents, rows)
    elif args is not None:
        source = "its arguments"
        arch, notes = arch_of_args(args, rows, source=f"{contents.path}: args")
    else:
        raise UserError(f"{contents.path}: neither {RUN_CONFIG_FILE} nor arguments say what model it is")
    if args is not None:
        notes = (*notes, f"saved by {_layout_of(args)}")
    weights = StackedWeights(reader, arch, source=source, of_training=True)
    form = f"common state in {COMMON_FILE}" if has(contents, COMMON_FILE) else "common state among the tensors"
    tokenizer = contents.inside(TOKENIZER)
    return Checkpoint(
        contents.path,
        NAME,
        arch,
        weights.dtype(),
        weights,
        tokenizer if tokenizer.names() else None,
        (*notes, form, *_iteration_note(state)),
    )


def _iteration(contents: Contents) -> Contents:
    """The iteration that the folder of a run names as its last, or the folder itself."""
    if not has(contents, LATEST_FILE):
        return contents
    text = read_small(contents, LATEST_FILE, limit=64).decode("ascii", "replace").strip()
    if text != "release" and not re.fullmatch(r"\d{1,12}", text):
        raise UserError(f"{contents.path / LATEST_FILE}: {text!r}: must be the number of an iteration, or release")
    name = "release" if text == "release" else f"iter_{int(text):07d}"
    inner = contents.inside(name)
    if not inner.names():
        raise UserError(f"{contents.path / LATEST_FILE}: names {text}, and there is no {name} beside it")
    return inner


def _iteration_note(state: Mapping[str, Any] | None) -> tuple[str, ...]:
    iteration = (state or {}).get("iteration")
    return (f"iteration {iteration}",) if isinstance(iteration, int) else ()


def _layout_of(args: Mapping[str, Any]) -> str:
    degrees = (args.get("tensor_model_parallel_size"), args.get("pipeline_model_parallel_size"))
    return "tensor {} x pipeline {}".format(*(degree if isinstance(degree, int) else "?" for degree in degrees))


def arch_of_args(args: Mapping[str, Any], rows: int, *, source: str) -> tuple[ModelArch, tuple[str, ...]]:
    """The shape that the arguments of a run describe, whose embedding has so many rows, and what to note of it."""
    values = dict(args)
    called = {}
    for ours, theirs in ARGUMENT_NAMES.items():
        if theirs in args and (ours not in args or args[ours] is None or ours == "seq_length" or args[theirs] is True):
            values[ours], called[ours] = args[theirs], theirs
    swiglu, squared = args.get("swiglu"), args.get("squared_relu")
    values["activation_func"] = "silu" if swiglu else "squared_relu" if squared else None
    values["gated_linear_unit"] = bool(swiglu)
    values["share_embeddings_and_output_weights"] = not args.get("untie_embeddings_and_output_weights")
    if not args.get("group_query_attention"):
        values["num_query_groups"] = None
    fields = ModelFields(values, source=source, called={**called, "activation_func": "swiglu"})
    for name, allowed in (("spec", None), ("hybrid_override_pattern", None), ("use_legacy_models", False)):
        if args.get(name) not in (None, allowed):
            raise fields.refusal(name, "only Megatron-Core's GPT model is supported")
    scaling = scaled_by(fields.number("rope_scaling_factor", default=8.0)) if fields.flag("use_rope_scaling") else None
    said = args.get("vocab_size")
    multiple = args.get("make_vocab_size_divisible_by")
    if isinstance(said, int) and rows not in (said, padded(said, multiple, args)):
        said = None  # of a tokenizer that says another number than the table was made for
    words, notes = vocabulary(rows, said, source=source)
    return arch_of(fields, vocab_size=words, rope_scaling=scaling), notes


def args_of(arch: ModelArch, *, dtype: torch.dtype, layout: Layout) -> argparse.Namespace:
    """Arguments that Megatron-LM, given them from the checkpoint, builds this model by.

    UserError for a rotary scaling that it cannot be told.
    """
    factor = llama31_factor(arch, target="Megatron-LM")
    is_1p, gqa = arch.normalization == "LayerNorm1p", arch.num_query_groups != arch.num_attention_heads
    return argparse.Namespace(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups if gqa else 1,
        group_query_attention=gqa,
        kv_channels=arch.kv_channels,
        seq_length=arch.seq_length,
        max_position_embeddings=arch.seq_length,
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=_whole(arch.rotary_base),
        rotary_percent=arch.rotary_percent,
        rotary_interleaved=False,
        use_rope_scaling=factor is not None,
        rope_scaling_factor=8.0 if factor is None else factor,
        add_bias_linear=False,
        add_qkv_bias=arch.add_qkv_bias,
        qk_layernorm=arch.qk_layernorm,
        swiglu=arch.activation == "swiglu",
        squared_relu=arch.activation == "squared_relu",
        normalization="LayerNorm" if is_1p else arch.normalization,
        apply_layernorm_1p=is_1p,
        layernorm_zero_centered_gamma=is_1p,
        norm_epsilon=arch.norm_epsilon,
        layernorm_epsilon=arch.norm_epsilon,
        untie_embeddings_and_output_weights=not arch.share_embeddings_and_output_weights,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_experts=None,
        spec=None,
        vocab_size=arch.vocab_size,
        make_vocab_size_divisible_by=VOCABULARY_MULTIPLE,
        padded_vocab_size=padded(arch.vocab_size, VOCABULARY_MULTIPLE, {"tensor_model_parallel_size": layout.tp}),
        tokenizer_type="HuggingFaceTokenizer",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        world_size=layout.model_ranks,
        data_parallel_size=1,
        ckpt_format="torch_dist",
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        iteration=ITERATION,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        no_save_optim=True,
        no_save_rng=True,
        **{FAMILY: arch.family},
    )


def _whole(number: float) -> float:
    """Megatron-LM's rotary base is a whole number."""
    return int(number) if number == int(number) else number


def write(
    output: Any,
    model: Checkpoint,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    origin: Origin,
    layout: Layout | None = None,
    common_is_object: bool = False,
) -> None:
    """Publish the stream of a model's tensors as a folder that Megatron-LM's `--load` takes and Megatron-Bridge opens.

    With `common_is_object` the common state is where Megatron-Core 0.19 puts it, which 0.16 cannot read; without it,
    both can. UserError for a model that Megatron-LM cannot be told.
    """
    layout = layout or Layout()
    args = args_of(model.arch, dtype=model.dtype, layout=layout)
    has_tokenizer = model.tokenizer is not None
    run_config = run_config_of(model.arch, dtype=model.dtype, layout=layout, tokenizer=has_tokenizer)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    needed = model.arch.num_params() * model.dtype.itemsize
    with publishing(output, kind=NAME, origin=origin, needed=needed) as draft:
        name = f"iter_{ITERATION:07d}"
        folder = draft.folder / name
        folder.mkdir()
        (draft.folder / LATEST_FILE).write_text(str(ITERATION), encoding="ascii")
        (folder / RUN_CONFIG_FILE).write_text(yaml.safe_dump(run_config, sort_keys=False), encoding="utf-8")
        if model.tokenizer is not None:
            (folder / TOKENIZER).mkdir()
            copy_tokenizer(model.tokenizer, folder / TOKENIZER)
        write_stream(
            draft,
            name,
            tensors,
            arch=model.arch,
            dtype=model.dtype,
            layout=layout,
            common=common,
            common_is_object=common_is_object,
        )
