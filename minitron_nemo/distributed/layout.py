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
class Place:
    """A rank's number in its group of each kind."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """Degrees of tensor, pipeline, context and data parallelism, and chunks of the model on each pipeline stage.

    Raises UserError for degrees that cannot be.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1  # context: ranks that share each sequence
    vpp: int = 1  # virtual pipeline: model chunks on each stage
    dp: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "cp", "vpp", "dp"):
            if getattr(self, name) < 1:
                raise UserError(f"layout: {name}={getattr(self, name)}: every degree is at least 1")
        if self.vpp > 1 and self.pp == 1:
            raise UserError(
                f"parallel.virtual_pipeline_model_parallel_size={self.vpp}: needs pipeline_model_parallel_size of at "
                "least 2"
            )
        if self.sequence_parallel and self.tp == 1:
            raise UserError("parallel.sequence_parallel=true: needs tensor_model_parallel_size of at least 2")

    @classmethod
    def of_world(
        cls, ranks: int, *, tp: int = 1, pp: int = 1, cp: int = 1, vpp: int = 1, sequence_parallel: bool = False
    ) -> "Layout":
        """The layout of so many ranks; what tensor, pipeline and context parallelism leave is data parallel."""
        if ranks < 1 or ranks % (tp * pp * cp):
            context = f" x context_parallel_size={cp}" if cp > 1 else ""
            raise UserError(
                f"{ranks} ranks: must be a multiple of tensor_model_parallel_size x pipeline_model_parallel_size"
                f"{context} = {tp * pp * cp}"
            )
        return cls(tp=tp, pp=pp, cp=cp, vpp=vpp, dp=ranks // (tp * pp * cp), sequence_parallel=sequence_parallel)

    @property
    def model_ranks(self) -> int:
        """Ranks over which one copy of the weights is spread."""
        return self.tp * self.pp

    @property
    def batch_ranks(self) -> int:
        """Ranks over which the tokens of a batch are spread: copies of every weight, whose gradients add up."""
        return self.dp * self.cp

    @property
    def world_size(self) -> int:
        return self.model_ranks * self.batch_ranks

    def place(self, rank: int) -> Place:
        """Where a rank of the world is: Megatron's order, tensor parallel ranks being neighbors, then context, data."""
        return Place(
            tp=rank % self.tp,
            cp=rank // self.tp % self.cp,
            dp=rank // (self.tp * self.cp) % self.dp,
            pp=rank // (self.tp * self.cp * self.dp),
        )

    def check(
        self,
        arch: ModelArch,
        *,
        name: str = "model",
        stages: Sequence[int] | None = None,
        setting: str = "parallel.tensor_model_parallel_size",
    ) -> None:
        """Refuse a shape that this layout cannot be laid over, naming the sizes; `stages` as in `stages`.

        `setting` is what gave the tensor-parallel degree.
        """
        for axis in SPLIT_OVER_TP:
            if (size := getattr(arch, axis)) % self.tp:
                raise UserError(
                    f"{setting}={self.tp}: must divide the {name}'s {axis}={size}; "
                    f"allowed are {', '.join(map(str, legal_tp(arch)[:12]))}"
                )
        try:
            self.stages(arch.num_layers, stages)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def check_sequence(self, seq_length: int, *, setting: str = "tensor_model_parallel_size") -> None:
        """Refuse a sequence that its ranks cannot share evenly; `setting` is what gave the tensor-parallel degree."""
        if self.sequence_parallel and (seq_length // self.cp) % self.tp:
            context = f" x context_parallel_size={self.cp}" if self.cp > 1 else ""
            raise UserError(
                f"data.seq_length={seq_length}: sequence parallelism needs a multiple of {setting}={self.tp}{context}"
            )
        if self.cp > 1 and seq_length % (2 * self.cp):
            raise UserError(
                f"data.seq_length={seq_length}: context parallelism needs a multiple of "
                f"2 x context_parallel_size={self.cp}"
            )

    def stages(self, num_layers: int, split: Sequence[int] | None = None) -> list[int]:
        """Layers of each model chunk, in the order of the forward pass: `split`, or as even as they divide.

        Later chunks get the fewest, as the last also holds the head. Raises UserError when layers would be lost or a
        chunk left empty.
        """
        chunks = self.pp * self.vpp
        if split is None:
            if num_layers < chunks:
                degrees = f"pipeline_model_parallel_size={self.pp}"
                if self.vpp > 1:
                    degrees += f" x virtual_pipeline_model_parallel_size={self.vpp}"
                raise UserError(f"{degrees}: a model of {num_layers} layers has at most that many chunks")
            return [num_layers // chunks + (chunk < num_layers % chunks) for chunk in range(chunks)]
        if len(split) != chunks or sum(split) != num_layers or min(split) < 1:
            raise UserError(
                f"pipeline stage layers {list(split)}: needs {chunks} numbers of at least 1 that add up to "
                f"{num_layers} layers"
            )
        return list(split)

    def chunks_of(self, stage: int) -> list[int]:
        """The numbers of the model chunks on a pipeline stage, in the order of the forward pass."""
        return list(range(stage, self.pp * self.vpp, self.pp))

    def check_schedule(self, num_microbatches: int, *, name: str) -> None:
        """Refuse a number of micro-batches that the interleaved schedule cannot take: it goes by groups of `pp`."""
        if self.vpp > 1 and num_microbatches % self.pp:
            raise UserError(
                f"{name}: {num_microbatches} micro-batches on each data-parallel rank; the interleaved pipeline needs "
                f"a multiple of pipeline_model_parallel_size={self.pp}, or virtual_pipeline_model_parallel_size=1"
            )

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
        virtual = f" x {self.vpp} chunks" if self.vpp > 1 else ""
        context = f"context {self.cp}, " if self.cp > 1 else ""
        words = f"tensor {self.tp}, pipeline {self.pp}{virtual}, {context}data {self.dp}"
        return words + (", sequence parallel" if self.sequence_parallel else "")


def context_chunks(rank: int, size: int) -> tuple[int, int]:
    """Which of the 2 x `size` chunks of a sequence a context-parallel rank has: mirrored, as Megatron's rotary
    embedding expects, so that the early one and the late one together see as many tokens on every rank.
    """
    return rank, 2 * size - 1 - rank


def legal_tp(arch: ModelArch) -> list[int]:
    """Every tensor-parallel degree that a shape can be split over, ascending."""
    common = math.gcd(*(getattr(arch, axis) for axis in SPLIT_OVER_TP))
    return [tp for tp in range(1, common + 1) if common % tp == 0]
