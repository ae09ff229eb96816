"""Weights of NeMo 1 in one file for each rank: the parts put together to logical tensors when they are read.

Source: NeMo 1.23, `NLPSaveRestoreConnector`: one rank `model_weights.ckpt`, tensor parallelism alone
`mp_rank_XX/model_weights.ckpt`, with a pipeline `tp_rank_XX_pp_rank_XXX/model_weights.ckpt`. Layers of a file are
numbered from 0, and an interleaved pipeline has the chunks of a rank under `model_0`, `model_1`, ...
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.artefacts.contents import Contents
from minitron_nemo.checkpoint.buffers import new_tensor
from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import ShapedSource
from minitron_nemo.checkpoint.state_dict_file import StateDictFile
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.tensors import EMBEDDING, FINAL_NORM, LAYER, OUTPUT, LogicalTensor

# Digits are those of ASCII: an expression takes those of every script for `\d`.
RANK_FILE = re.compile(
    r"(?:mp_rank_(?P<mp>\d\d)/|tp_rank_(?P<tp>\d\d)_pp_rank_(?P<pp>\d\d\d)/)?model_weights\.ckpt", re.ASCII
)
_NAME = re.compile(r"(?:model_?(?P<chunk>\d{1,4})\.)?(?:model\.)?(?:module\.)?(?P<rest>.+)", re.ASCII)
_IN_LAYER = re.compile(rf"{re.escape(LAYER)}\.(\d{{1,6}})\.(.+)", re.ASCII)
_NO_WEIGHT = re.compile(r".*(_extra_state|rotary_pos_emb\.inv_freq|rotary_emb\.inv_freq)")

# The layers of Megatron-Core without Transformer Engine, and those of NeMo itself (mcore_gpt=false), to ours.
_SPELLINGS = {
    "language_model.embedding.word_embeddings.weight": EMBEDDING,
    "language_model.output_layer.weight": OUTPUT,
    "language_model.encoder.final_layernorm.": f"{FINAL_NORM}.",
    "language_model.encoder.layers.": f"{LAYER}.",
}
_LAYER_SPELLINGS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "post_attention_layernorm.": "mlp.linear_fc1.layer_norm_",
    "self_attention.query_key_value.": "self_attention.linear_qkv.",
    "self_attention.dense.": "self_attention.linear_proj.",
    "mlp.dense_h_to_4h.": "mlp.linear_fc1.",
    "mlp.dense_4h_to_h.": "mlp.linear_fc2.",
}


@dataclass(frozen=True)
class _Part:
    """A tensor of a rank, under its name in the file."""

    file: StateDictFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.shape(self.name)

    @property
    def label(self) -> str:
        return f"{self.file.label}: tensor {self.name}"


class RankFiles:
    """The files of all ranks: for each chunk of the model in forward order and each tensor-parallel rank its tensors.

    Raises UserError for ranks that are missing or that hold other tensors than their neighbors.
    """

    def __init__(self, contents: Contents) -> None:
        self.path = contents.path
        ranks = {}
        for name in contents.names():
            if (match := RANK_FILE.fullmatch(name)) is not None:
                stretch = contents.find(name)
                assert stretch is not None
                place = int(match["mp"] or match["tp"] or 0), int(match["pp"] or 0)
                if place in ranks:
                    raise UserError(f"{contents.path / name}: rank {place[0]} has two files; leave one")
                ranks[place] = StateDictFile(stretch, label=contents.path / name)
        self.tp, self.pp = (max(place[dim] for place in ranks) + 1 for dim in range(2))
        for tp in range(self.tp):
            for pp in range(self.pp):
                if (tp, pp) not in ranks:
                    raise UserError(
                        f"{self.path}: the weights of tensor-parallel rank {tp}, pipeline stage {pp} are missing; "
                        f"there are those of {len(ranks)} ranks, and {self.tp} x {self.pp} belong together"
                    )
        stages = [[_chunks_of(ranks[tp, pp]) for tp in range(self.tp)] for pp in range(self.pp)]
        self.vpp = max(len(chunks) for stage in stages for chunks in stage)
        for numbers in (sorted(chunks) for stage in stages for chunks in stage):
            if numbers != list(range(len(numbers))):
                raise UserError(f"{self.path}: a rank has the chunks {numbers[:8]} of the model; one is missing")
        self.tensors: dict[str, list[_Part]] = {}  # by logical name: the parts of all tensor-parallel ranks
        self.copies: dict[str, list[_Part]] = {}  # of what a later chunk holds once more
        first_layer = 0
        for number in range(self.vpp * self.pp):
            stage = stages[number % self.pp]
            first_layer += self._add_chunk(stage, number // self.pp, first_layer)

    def _add_chunk(self, stage: list[dict[int, dict[str, _Part]]], chunk: int, first_layer: int) -> int:
        """Take the tensors of one chunk of the model; how many layers it has."""
        of_ranks = [chunks.get(chunk, {}) for chunks in stage]
        names = set(of_ranks[0])
        for tensors in of_ranks[1:]:
            if odd := sorted(names ^ set(tensors)):
                raise UserError(f"{self.path}: tensor-parallel ranks disagree: only some have {odd[0]}")
        layers = set()
        for name in of_ranks[0]:
            match = _IN_LAYER.fullmatch(name)
            if match is not None:
                layers.add(int(match[1]))
            logical = name if match is None else f"{LAYER}.{int(match[1]) + first_layer}.{match[2]}"
            parts = [tensors[name] for tensors in of_ranks]
            if logical in self.tensors:
                self.copies[logical] = parts
            else:
                self.tensors[logical] = parts
        if layers != set(range(len(layers))):
            raise UserError(f"{self.path}: a pipeline stage has the layers {sorted(layers)[:8]}; one is missing")
        return len(layers)

    @property
    def rows(self) -> int:
        """Of the embedding, its padding included."""
        if EMBEDDING not in self.tensors:
            raise UserError(f"{self.path}: no tensor {EMBEDDING}; only models of the kind GPT are read")
        for part in self.tensors[EMBEDDING]:
            if len(part.shape) != 2:
                raise UserError(f"{part.label} is {part.shape}; a table has rows and columns")
        return sum(part.shape[0] for part in self.tensors[EMBEDDING])

    @property
    def layout(self) -> str:
        interleaved = f" x {self.vpp} chunks" if self.vpp > 1 else ""
        return f"files of tensor {self.tp} x pipeline {self.pp}{interleaved}"


def _chunks_of(file: StateDictFile) -> dict[int, dict[str, _Part]]:
    """The tensors of a file by chunk and by our name of them."""
    chunks: dict[int, dict[str, _Part]] = {}
    for name in file.names():
        if _NO_WEIGHT.fullmatch(name):
            continue
        match = _NAME.fullmatch(name.removeprefix("state_dict."))
        if match is None or not name.isprintable():
            raise UserError(f"{file.label}: {name[:60]!a} is no name of a tensor")
        tensors = chunks.setdefault(int(match["chunk"] or 0), {})
        ours = _our_name(match["rest"])
        if ours in tensors:
            raise UserError(f"{file.label}: {tensors[ours].name} and {name} are one tensor; leave one")
        tensors[ours] = _Part(file, name)
    return chunks


def _our_name(name: str) -> str:
    for theirs, ours in _SPELLINGS.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
    if (match := _IN_LAYER.fullmatch(name)) is not None:
        rest = match[2]
        for theirs, ours in _LAYER_SPELLINGS.items():
            if rest.startswith(theirs):
                rest = ours + rest.removeprefix(theirs)
        name = f"{LAYER}.{match[1]}.{rest}"
    return name


class RankWeights(ShapedSource):
    """The logical tensors of a model of shape `arch` in the files of ranks, the vocabulary's padding trimmed.

    Raises UserError, on opening, for a tensor that is missing, extra, misshapen or of two dtypes, and when it is read
    for ranks that hold other copies of it.
    """

    def __init__(self, files: RankFiles, arch: ModelArch, *, source: str) -> None:
        super().__init__(arch)
        self.files = files
        if arch.share_embeddings_and_output_weights and OUTPUT in files.tensors:
            files.copies[EMBEDDING] = files.tensors.pop(OUTPUT)  # of the last stage, where the head is
        self._dtype = self._check(source)

    def dtype(self, name: str | None = None) -> torch.dtype:
        """The one dtype of all tensors."""
        return self._dtype

    def read(self, name: str, box: Box | None = None) -> Tensor:
        tensor = self._merged(self.tensors[name], self.files.tensors[name])
        copies = self.files.copies.get(name)
        if copies is not None and not torch.equal(tensor, self._merged(self.tensors[name], copies)):
            raise UserError(f"{copies[0].label}: another copy of {name} than that of the first stage")
        return tensor if box is None else tensor[box.slices()].contiguous()

    def _merged(self, logical: LogicalTensor, parts: list[_Part]) -> Tensor:
        if (dim := logical.row.split) is None:
            tensor = parts[0].file.read(parts[0].name)
            for part in parts[1:]:
                if not torch.equal(tensor, part.file.read(part.name)):
                    raise UserError(f"{part.label}: another copy than that of tensor-parallel rank 0")
            return tensor
        shape = logical.shape(self.arch)
        result = new_tensor(shape, self._dtype)
        for rank, part in enumerate(parts):
            local = part.file.read(part.name)
            for piece in logical.row.dims[dim].tensor_parallel_pieces(part.shape[dim], rank=rank, tp=self.files.tp):
                length = min(piece.length, shape[dim] - piece.start)
                if length > 0:
                    result.narrow(dim, piece.start, length).copy_(local.narrow(dim, piece.local, length))
        return result

    def _check(self, source: str) -> torch.dtype:
        found = self.files.tensors
        for name, logical in self.tensors.items():
            if name not in found:
                raise UserError(f"{self.files.path}: tensor {name} is missing; {source} describes a model that has it")
            self._check_shapes(logical, source)
        if extra := sorted(set(found) - set(self.tensors)):
            raise UserError(f"{found[extra[0]][0].label}: belongs to no part of the model in {source}")
        parts = [part for name in self.tensors for part in found[name]]
        dtype = parts[0].file.dtype(parts[0].name)
        for part in parts:
            if part.file.dtype(part.name) != dtype:
                raise UserError(f"{part.label} is {part.file.dtype(part.name)}, others are {dtype}")
        return dtype

    def _check_shapes(self, logical: LogicalTensor, source: str) -> None:
        shape, dim, tp = logical.shape(self.arch), logical.row.split, self.files.tp
        for part in [*self.files.tensors[logical.name], *self.files.copies.get(logical.name, [])]:
            expected = list(shape)
            if dim is not None and logical.row.is_vocabulary:
                expected[dim] = max(self.files.rows // tp, 1)
            elif dim is not None:
                expected[dim] = shape[dim] // tp if shape[dim] % tp == 0 else -1
            if part.shape != tuple(expected):
                raise UserError(f"{part.label} is {part.shape}; {source} and {tp} tensor-parallel ranks say {shape}")
