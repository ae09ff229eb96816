"""The proof of a cut: the sliced student computes what its masked source computes, on a few tokens.

Both models run block by block, side by side, each tensor read once. The student runs twice, as one batch: on its own
residual stream, which ends in the logits that are compared; and on the source's, so that each block is compared on the
same input. In the dtype of a checkpoint the logits of a deep model carry the rounding of every block before; a block
alone does not, so that one wrong neuron in one layer is seen.

Repairs change weights after the cut, so that no masked source computes what the repaired student does. With repairs the
cut is proven before them, straight from the source; and that what they made is what was written, by its hashes.

The tokens are text of the calibration set, where the importance that chose the units kept some, so that activations are
of the sizes that the model has in use. The claim is about indices, which rows of which tensor went where, and holds for
any tokens: without text random ids from a fixed seed prove it too.

Shapes: B samples, S tokens, H hidden_size, K kept channels, V words at a time.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitron_nemo.checkpoint.source import TensorSource, ended
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.masked import MaskedModel
from minitron_nemo.pruning.plain_forward import PlainModel, runs_of_words
from minitron_nemo.pruning.plan import PruningPlan
from minitron_nemo.shape.tensors import EMBEDDING

SAMPLES, SEQ_LENGTH = 2, 32  # every unit of every block takes part in each token
CALIBRATION, RANDOM = "calibration", "random"  # what the tokens are

# What a block may be off on the same input: root mean square of the difference over that of the source's output.
# Masked and sliced models add the same numbers in another order, so that float32 differs in its last bits, and a
# rounding to 16 bits falls to the other side for few elements. A wrong neuron of 14336 is off by 0.012.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 5e-4, torch.bfloat16: 4e-3}
# What may become of it in the logits: errors of blocks add like random numbers, and later blocks amplify them.
AMPLIFICATION = 8.0


class ProofError(UserError):
    """A checkpoint that does not compute what it should; it must not be published."""


@dataclass(frozen=True)
class Proof:
    """What was compared and found; differences of logits in the logits' own unit.

    `off` is the root mean square of the difference over that of the masked source's logits, `tolerance` what is
    allowed of it; `worst_block` differs most on the same input, by `block_off` of at most `block_tolerance`.
    """

    tokens: str  # CALIBRATION or RANDOM
    samples: int
    seq_length: int
    dtype: str
    max_difference: float
    mean_difference: float
    top1_agreement: float
    off: float
    tolerance: float
    worst_block: str
    block_off: float
    block_tolerance: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """The proof on one line."""
        return (
            f"proof: sliced against masked in {self.dtype} on {self.samples} x {self.seq_length} {self.tokens} tokens: "
            f"logits differ by {self.max_difference:.2g} at most, {self.mean_difference:.2g} in the mean, top-1 "
            f"agreement {self.top1_agreement:.1%}, {self.off:.2g} of their size (allowed {self.tolerance:.2g}); most "
            f"in {self.worst_block}, {self.block_off:.2g} (allowed {self.block_tolerance:.2g})"
        )


@torch.no_grad()
def prove_cut(
    source: TensorSource,
    student: TensorSource,
    plan: PruningPlan,
    *,
    text_BS: Tensor | None = None,
    samples: int = SAMPLES,
    seq_length: int = SEQ_LENGTH,
    seed: int = 0,
    device: torch.device | None = None,
) -> Proof:
    """Compare `student` with `source` under the masks of `plan`, in the dtype of the student's embedding.

    On the first `samples` x `seq_length` tokens of `text_BS`, ids of the source, without the words that a smaller
    vocabulary lacks; on random tokens where there are not so many.
    Raises ProofError, naming the first block that is off, when they differ by more than rounding, and UserError when
    the source itself has no finite logits.
    """
    if student.arch != plan.target:
        raise ProofError(f"proof: the pruned model is {student.arch.describe()}; the plan's target is another")
    dtype = student.dtype(EMBEDDING)
    teacher = MaskedModel(source, plan, dtype=dtype, device=device)
    sliced = PlainModel(student, dtype=dtype, device=device)
    seq_length = min(seq_length, plan.target.seq_length)
    tokens_BS = None if text_BS is None else _of_student(text_BS, teacher.kept_words(), (samples, seq_length))
    what = RANDOM if tokens_BS is None else CALIBRATION
    if tokens_BS is None:
        generator = torch.Generator().manual_seed(seed)
        tokens_BS = torch.randint(0, plan.target.vocab_size, (samples, seq_length), generator=generator)
    comparison = _Comparison(TOLERANCES[dtype])
    logits = _side_by_side(teacher, sliced, tokens_BS, comparison)
    tolerance = AMPLIFICATION * TOLERANCES[dtype] * math.sqrt(2 * plan.target.num_layers + 1)
    if not logits.off <= tolerance:
        raise ProofError(
            f"proof: the logits of the pruned model are off by {logits.off:.2g} of their size, allowed is "
            f"{tolerance:.2g}, though each block computes what the masked source computes; {ADVICE}"
        )
    return Proof(
        tokens=what,
        samples=samples,
        seq_length=seq_length,
        dtype=str(dtype).removeprefix("torch."),
        max_difference=logits.largest,
        mean_difference=logits.mean,
        top1_agreement=logits.top1_agreement,
        off=logits.off,
        tolerance=tolerance,
        worst_block=comparison.worst,
        block_off=comparison.off,
        block_tolerance=comparison.tolerance,
    )


def _of_student(text_BS: Tensor, words: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """Text as ids of the student, [samples, seq_length], without the words that went; None when it is too short."""
    samples, seq_length = shape
    rows = []
    for row in text_BS[:samples]:
        kept = row[torch.isin(row, words)][:seq_length]
        rows.append(torch.searchsorted(words, kept))
    whole = len(rows) == samples and all(len(row) == seq_length for row in rows)
    return torch.stack(rows) if whole else None


ADVICE = "nothing was published: this is a fault of the program, please report it (prune.proof=false publishes anyway)"


class _Comparison:
    """Blocks compared on the same input; keeps the worst, refuses the first that is off."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance, self.off, self.worst = tolerance, -1.0, ""

    def add(self, block: str, theirs: Tensor, ours: Tensor) -> None:
        difference, size = (ours - theirs).double().square().mean().sqrt(), theirs.double().square().mean().sqrt()
        self.judge(block, float(difference), float(size))

    def judge(self, block: str, difference: float, size: float) -> None:
        """Both as root mean square."""
        if not math.isfinite(size):
            raise UserError(
                f"proof: the checkpoint to cut is not finite in {block}: a model whose logits are not finite cannot be "
                "proven; check its weights, or set prune.proof=false"
            )
        off = difference / size if size > 0 else difference
        if not off <= self.tolerance:
            raise ProofError(
                f"proof: {block} of the pruned model does not compute what the masked source computes: off by "
                f"{off:.2g} of its size, allowed is {self.tolerance:.2g}; {ADVICE}"
            )
        if off > self.off:
            self.off, self.worst = off, block


class _LogitStatistics:
    """Sums over the logits of all words, piece by piece; the whole of them never exists."""

    def __init__(self) -> None:
        self.count, self.difference, self.squares, self.size, self.largest = 0, 0.0, 0.0, 0.0, 0.0
        self.best: tuple[Tensor, Tensor] | None = None  # [models, B, S]: the highest logit so far, and its word

    def add(self, first: int, theirs_BSV: Tensor, ours_BSV: Tensor) -> None:
        """The logits of both models for the student's words from `first` on."""
        difference = (ours_BSV - theirs_BSV).double().abs()
        self.count += difference.numel()
        self.difference += float(difference.sum())
        self.squares += float(difference.square().sum())
        self.size += float(theirs_BSV.double().square().sum())
        self.largest = max(self.largest, float(difference.max()))
        value, word = torch.stack((theirs_BSV, ours_BSV)).max(-1)
        word = word + first
        if self.best is not None:
            higher = value > self.best[0]
            value, word = torch.where(higher, value, self.best[0]), torch.where(higher, word, self.best[1])
        self.best = value, word

    @property
    def mean(self) -> float:
        return self.difference / self.count

    @property
    def root_mean_squares(self) -> tuple[float, float]:
        """Of the difference, and of the masked source's logits."""
        return math.sqrt(self.squares / self.count), math.sqrt(self.size / self.count)

    @property
    def off(self) -> float:
        difference, size = self.root_mean_squares
        return difference / size if size > 0 else difference

    @property
    def top1_agreement(self) -> float:
        assert self.best is not None
        theirs, ours = self.best[1]
        return float((theirs == ours).double().mean())


def _side_by_side(
    teacher: MaskedModel, sliced: PlainModel, tokens_BS: Tensor, comparison: _Comparison
) -> _LogitStatistics:
    """Both models through all blocks; the student's batch is [its own residual stream; the source's]."""
    x_BSH, own_BSK = teacher.embed(teacher.kept_words()[tokens_BS]), sliced.embed(tokens_BS)
    comparison.add("the embedding", teacher.kept_channels(x_BSH), own_BSK)
    for place, layer in enumerate(teacher.plan.layers):
        blocks = (("attention", teacher.attention, sliced.attention), ("MLP", teacher.mlp, sliced.mlp))
        for name, masked_block, sliced_block in blocks:
            update_BSH = masked_block(layer, x_BSH)
            both = sliced_block(place, torch.cat((own_BSK, teacher.kept_channels(x_BSH))))
            update_BSK, same_input_BSK = both.chunk(2)
            comparison.add(f"the {name} of layer {place + 1}", teacher.kept_channels(update_BSH), same_input_BSK)
            x_BSH, own_BSK = x_BSH + update_BSH, own_BSK + update_BSK
    return _logits(teacher, sliced, x_BSH, own_BSK, comparison)


def _logits(
    teacher: MaskedModel, sliced: PlainModel, x_BSH: Tensor, own_BSK: Tensor, comparison: _Comparison
) -> _LogitStatistics:
    """The logits of both models, and the output heads compared on the same input."""
    z_BSH, words = teacher.final_norm(x_BSH), teacher.kept_words()
    z_own_and_same = sliced.final_norm(torch.cat((own_BSK, teacher.kept_channels(x_BSH))))
    statistics, same_input, done = _LogitStatistics(), _LogitStatistics(), 0
    for first, count in runs_of_words(teacher.arch.vocab_size):
        kept = words[(words >= first) & (words < first + count)] - first
        if not len(kept):
            continue
        theirs_BSV = teacher.logits(z_BSH, first, count)[..., kept.to(z_BSH.device)]
        own_BSV, same_input_BSV = sliced.logits(z_own_and_same, done, len(kept)).chunk(2)
        statistics.add(done, theirs_BSV, own_BSV)
        same_input.add(done, theirs_BSV, same_input_BSV)
        done += len(kept)
    comparison.judge("the output head", *same_input.root_mean_squares)
    return statistics


class Digests:
    """What went to the writer, to compare with what is read back: for weights that no masked model computes."""

    def __init__(self) -> None:
        self.sha256: dict[str, str] = {}

    def noted(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same stream, each tensor noted as it goes by; it must come in the dtype that it is stored in."""
        with ended(tensors) as stream:
            for name, tensor in stream:
                self.sha256[name] = _sha256(tensor)
                yield name, tensor

    def check(self, written: TensorSource) -> None:
        """Raises ProofError, naming the first tensor that is not what it was."""
        for name in written.names():
            if _sha256(written.read(name)) != self.sha256.get(name):
                raise ProofError(f"proof: {name} is not in the checkpoint as it was repaired; {ADVICE}")


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
