"""How a model and a batch are split over ranks: all the arithmetic, and none of the processes.

One record is asked by the checks before a start, by `dry_run` and by the engine, so they cannot disagree.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch

# What tensor parallelism must divide.
SPLIT_OVER_TP = ("num_attention_heads", "num_query_groups", "ffn_hidden_size")
VOCABULARY_MULTIPLE = 8  # rows of each rank's part of a split vocabulary, for the matrix units


@dataclass(frozen=True)
class Share:
    """One data-parallel rank's part of a batch: `samples` of it in micro-batches of `micro_batch`."""

    samples: int
    micro_batch: int

    @property
    def num_microbatches(self) -> int:
        return self.samples // self.micro_batch

    def first_samples(self, dp_rank: int, *, start: int = 0) -> list[int]:
        """The number of the first sample of each of the rank's micro-batches, in a batch that begins at `start`."""
        begin = start + dp_rank * self.samples
        return list(range(begin, begin + self.samples, self.micro_batch))


@dataclass(frozen=True)
class Layout:
    """Degrees of tensor, pipeline, context and data parallelism, and chunks of the model on each pipeline stage.

    `cp` and `vpp` are 1 until the engine takes more. Raises UserError for degrees that cannot be.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1  # virtual pipeline: model chunks on each stage
    dp: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "vpp", "dp"):
            if getattr(self, name) < 1:
                raise UserError(f"layout: {name}={getattr(self, name)}: every degree is at least 1")
        if self.cp > 1 or self.vpp > 1:
            raise UserError(f"layout: cp={self.cp}, vpp={self.vpp}: only 1 is supported of either")
        if self.sequence_parallel and self.tp == 1:
            raise UserError("parallel.sequence_parallel=true: needs tensor_model_parallel_size of at least 2")

    @classmethod
    def of_world(cls, ranks: int, *, tp: int = 1, pp: int = 1, sequence_parallel: bool = False) -> "Layout":
        """The layout of so many ranks; what tensor and pipeline parallelism leave is data parallel."""
        if ranks < 1 or ranks % (tp * pp):
            raise UserError(
                f"{ranks} ranks: must be a multiple of tensor_model_parallel_size x pipeline_model_parallel_size "
                f"= {tp * pp}"
            )
        return cls(tp=tp, pp=pp, dp=ranks // (tp * pp), sequence_parallel=sequence_parallel)

    @property
    def model_ranks(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp

    @property
    def world_size(self) -> int:
        return self.model_ranks * self.dp

    def check(self, arch: ModelArch, *, name: str = "model", stages: Sequence[int] | None = None) -> None:
        """Refuse a shape that this layout cannot be laid over, naming the sizes; `stages` as in `stages`."""
        for axis in SPLIT_OVER_TP:
            if (size := getattr(arch, axis)) % self.tp:
                raise UserError(
                    f"parallel.tensor_model_parallel_size={self.tp}: must divide the {name}'s {axis}={size}; "
                    f"allowed are {', '.join(map(str, legal_tp(arch)[:12]))}"
                )
        try:
            self.stages(arch.num_layers, stages)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def check_sequence(self, seq_length: int) -> None:
        """Refuse a sequence that its ranks cannot share evenly."""
        if self.sequence_parallel and seq_length % self.tp:
            raise UserError(
                f"data.seq_length={seq_length}: sequence parallelism needs a multiple of "
                f"tensor_model_parallel_size={self.tp}"
            )

    def stages(self, num_layers: int, split: Sequence[int] | None = None) -> list[int]:
        """Layers of each model chunk, in the order of the forward pass: `split`, or as even as they divide.

        Later chunks get the fewest, as the last also holds the head. Raises UserError when layers would be lost or a
        chunk left empty.
        """
        chunks = self.pp * self.vpp
        if split is None:
            if num_layers < chunks:
                raise UserError(
                    f"pipeline_model_parallel_size={chunks}: a model of {num_layers} layers has at most that many"
                )
            return [num_layers // chunks + (chunk < num_layers % chunks) for chunk in range(chunks)]
        if len(split) != chunks or sum(split) != num_layers or min(split) < 1:
            raise UserError(
                f"pipeline stage layers {list(split)}: needs {chunks} numbers of at least 1 that add up to "
                f"{num_layers} layers"
            )
        return list(split)

    def share(self, samples: int, micro_batch: int, *, name: str = "global_batch_size") -> Share:
        """Each data-parallel rank's part of a batch of `samples`; refuses one that would leave samples out."""
        step = micro_batch * self.dp
        if samples < 1 or samples % step:
            raise UserError(
                f"{name}={samples}: must be a multiple of micro_batch_size x data-parallel ranks = "
                f"{micro_batch} x {self.dp}"
            )
        return Share(samples // self.dp, micro_batch)

    def share_of(self, samples: range, dp_rank: int) -> range:
        """A data-parallel rank's stretch of some samples: none is left out, the last ranks may have fewer."""
        size = math.ceil(len(samples) / self.dp)
        return samples[dp_rank * size : (dp_rank + 1) * size]

    def padded_vocab_size(self, arch: ModelArch) -> int:
        """Rows of the embedding tables: where they are split, the next multiple of 8 for each rank."""
        multiple = 1 if self.tp == 1 else VOCABULARY_MULTIPLE * self.tp
        return math.ceil(arch.vocab_size / multiple) * multiple

    def describe(self) -> str:
        """`tensor 2, pipeline 1, data 4, sequence parallel`"""
        words = f"tensor {self.tp}, pipeline {self.pp}, data {self.dp}"
        return words + (", sequence parallel" if self.sequence_parallel else "")


def legal_tp(arch: ModelArch) -> list[int]:
    """Every tensor-parallel degree that a shape can be split over, ascending."""
    common = math.gcd(*(getattr(arch, axis) for axis in SPLIT_OVER_TP))
    return [tp for tp in range(1, common + 1) if common % tp == 0]
