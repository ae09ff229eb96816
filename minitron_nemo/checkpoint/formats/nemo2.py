"""Checkpoints of NeMo 2: a folder with `weights/` as torch_dist and `context/`, which describes model and tokenizer.

`context/model.yaml` is read as data. `io.json`, a graph of calls, is what NeMo 2 itself builds a model from: it is
written, and like pickles beside it never opened.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from minitron_nemo.artefacts.contents import Contents, has
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.paths import is_plain_name
from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.formats.foreign_yaml import function_name, read_yaml_mapping
from minitron_nemo.checkpoint.formats.megatron_config import (
    FAMILY,
    ModelFields,
    arch_of,
    core_fields,
    rope_scaling_of,
    vocabulary,
)
from minitron_nemo.checkpoint.formats.nemo import copy_tokenizer
from minitron_nemo.checkpoint.formats.nemo2_graph import Call, graph_of
from minitron_nemo.checkpoint.restricted_metadata import METADATA_FILE
from minitron_nemo.checkpoint.torch_dist import TorchDistReader
from minitron_nemo.checkpoint.torch_dist_weights import StackedWeights, vocabulary_rows, write_stream
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

NAME = "nemo2"
WEIGHTS, CONTEXT, HF_WEIGHTS = "weights", "context", "hf_weights"
CONFIG_FILE, GRAPH_FILE, TOKENIZER = "model.yaml", "io.json", "nemo_tokenizer"
PREFIX = "module."

_MODELS = "nemo.collections.llm.gpt.model"
# The classes of a model and of its config, by family; what a class fills in is written out beside it all the same.
CLASSES = {
    "llama": ("llama.LlamaModel", "llama.LlamaConfig"),
    "mistral": ("mistral.MistralModel", "mistral.MistralConfig7B"),
    "nemotron": ("nemotron.NemotronModel", "nemotron.NemotronConfig"),
    "qwen2": ("qwen2.Qwen2Model", "qwen2.Qwen2Config"),
    "qwen3": ("qwen3.Qwen3Model", "qwen3.Qwen3Config"),
}
SCALED_LLAMA = "llama.Llama31Config"
FUNCTIONS = {
    "swiglu": "torch.nn.functional.silu",
    "squared_relu": "nemo.collections.llm.fn.activation.squared_relu",
}
_CONTEXT = "nemo.lightning.io.pl.TrainerContext"
_TRAINER = "nemo.lightning.pytorch.trainer.Trainer"
AUTO_TOKENIZER = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"


def recognise(contents: Contents) -> bool:
    """Whether this is the folder of a checkpoint that NeMo 2 saved."""
    context = contents.inside(CONTEXT)
    return has(context, CONFIG_FILE) or has(context, GRAPH_FILE)


def open_checkpoint(contents: Contents) -> Checkpoint:
    """The checkpoint, its shape, keys, dtype and file sizes checked; UserError in one line for anything else."""
    context, weights_folder = contents.inside(CONTEXT), contents.inside(WEIGHTS)
    if not has(weights_folder, METADATA_FILE):
        if contents.inside(HF_WEIGHTS).names():
            raise UserError(f"{contents.path}: holds a Hugging Face folder; give {contents.path / HF_WEIGHTS} itself")
        raise UserError(f"{contents.path}: no {WEIGHTS}/{METADATA_FILE}; give the folder that holds {WEIGHTS}/")
    if not has(context, CONFIG_FILE):
        raise UserError(
            f"{context.path}: no {CONFIG_FILE}; {GRAPH_FILE} alone names classes whose defaults only NeMo knows: save "
            "the checkpoint with NeMo 2.0 or later"
        )
    reader = TorchDistReader(weights_folder)
    model = read_yaml_mapping(context, CONFIG_FILE)
    arch, notes = _arch_of(model, vocabulary_rows(reader, prefix=PREFIX), source=str(context.path / CONFIG_FILE))
    weights = StackedWeights(reader, arch, source=f"{CONTEXT}/{CONFIG_FILE}", prefix=PREFIX, of_training=True)
    return Checkpoint(contents.path, NAME, arch, weights.dtype(), weights, _tokenizer(context, model), notes)


def _tokenizer(context: Contents, model: Mapping[str, Any]) -> Contents | None:
    """The folder that the model's tokenizer is called by: NeMo 2 keeps the name of the one that it was made from."""
    section = model.get("tokenizer")
    said = section.get("pretrained_model_name") if isinstance(section, dict) else None
    names = [name for name in (said, TOKENIZER) if isinstance(name, str) and is_plain_name(name)]
    return next((folder for folder in map(context.inside, names) if folder.names()), None)


def _arch_of(model: Mapping[str, Any], rows: int, *, source: str) -> tuple[ModelArch, tuple[str, ...]]:
    values = model.get("config")
    if not isinstance(values, dict):
        raise UserError(f"{source}: no mapping under config; it must describe the model")
    name = function_name(model) or "model"
    values = {**values, "activation_func": function_name(values.get("activation_func"))}
    fields = ModelFields(values, source=source)
    words, notes = vocabulary(rows, values.get("vocab_size"), source=source)
    families = [family for family, (known, _) in CLASSES.items() if known.endswith(f".{name}")]
    arch = arch_of(
        fields, vocab_size=words, rope_scaling=rope_scaling_of(fields), family=families[0] if families else ""
    )
    return arch, (f"class {name}", *notes)


def context_of(arch: ModelArch, *, tokenizer: bool) -> Call:
    """The calls by which NeMo 2 builds a model; UserError for one that it has no class for."""
    if arch.family not in CLASSES:
        raise UserError(f"family={arch.family}: NeMo 2 is written for {', '.join(CLASSES)}; choose another format")
    model, config = CLASSES[arch.family]
    scaling: Mapping[str, Any] = {}
    if (rope := arch.rope_scaling) is not None:
        if arch.family != "llama":
            raise UserError(f"rope_scaling of family={arch.family}: NeMo 2 scales Llama only; choose another format")
        config = SCALED_LLAMA
        scaling = {
            "scale_factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "old_context_len": rope.original_max_position_embeddings,
        }
    values = {
        **core_fields(arch),
        "activation_func": Call(FUNCTIONS[arch.activation]),
        "apply_rope_fusion": False,  # which Transformer Engine alone has
        **scaling,
    }
    arguments: dict[str, Any] = {"config": Call(f"{_MODELS}.{config}", values)}
    if tokenizer:
        arguments["tokenizer"] = Call(AUTO_TOKENIZER, {"pretrained_model_name": TOKENIZER})
    trainer = Call(_TRAINER, {"devices": 1, "max_steps": 1})
    return Call(_CONTEXT, {"model": Call(f"{_MODELS}.{model}", arguments), "trainer": trainer})


def _as_yaml(value: Any) -> Any:
    """A call as NeMo 2 writes it to YAML."""
    if not isinstance(value, Call):
        return value
    if value.arguments is None:
        return {"_target_": value.target, "_call_": False}
    return {"_target_": value.target, **{name: _as_yaml(each) for name, each in value.arguments.items()}}


def _write_context(folder: Path, model: Checkpoint) -> None:
    context = context_of(model.arch, tokenizer=model.tokenizer is not None)
    assert context.arguments is not None
    described = _as_yaml(context.arguments["model"])
    described["config"][FAMILY] = model.arch.family
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
    (folder / GRAPH_FILE).write_text(json.dumps(graph_of(context), indent=2), encoding="utf-8")
    if model.tokenizer is not None:
        (folder / TOKENIZER).mkdir()
        copy_tokenizer(model.tokenizer, folder / TOKENIZER)


def write(
    output: str | Path,
    model: Checkpoint,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    origin: Origin,
    layout: Layout | None = None,
) -> None:
    """Publish the stream of a model's tensors as a checkpoint of NeMo 2; UserError for one that it has no class for."""
    context_of(model.arch, tokenizer=False)
    needed = model.arch.num_params() * model.dtype.itemsize
    with publishing(output, kind=NAME, origin=origin, needed=needed) as draft:
        context = draft.folder / CONTEXT
        context.mkdir()
        _write_context(context, model)
        write_stream(draft, WEIGHTS, tensors, arch=model.arch, dtype=model.dtype, layout=layout, prefix=PREFIX)
