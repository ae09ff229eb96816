"""The loss on hidden states, inside of both models, beside that on the logits.

    loss of a token = that of the output heads + weight * sum over pairs of a hidden state's loss

Every pipeline stage computes the part of its own layers, in the student's forward pass, and its gradient enters the
backward pass where the states were heard. Sums go over tokens, as those of the heads do, and are divided once.
Source: Minitron 2407.14679, whose weight is the ratio of both losses.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.distillation.teacher import TeacherOutputs
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.routes import Route
from minitron_nemo.engine.model import ModelChunks
from minitron_nemo.engine.schedule import Batch
from minitron_nemo.engine.taps import attached, tapping
from minitron_nemo.losses.hidden_state import HiddenStateLoss
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.losses.output import LOSS, TOKENS
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.taps import EMBEDDINGS, Pair, Tap
from minitron_nemo.training.state_map import StateMap

WEIGHT = "hidden_states_weight"  # in the log


@dataclass(frozen=True)
class _Compared:
    """A micro-batch on its way through this stage: its loss mask, as the states lie, and the teacher's states."""

    mask_SB: Tensor
    teacher: Mapping[Tap, Tensor]


class HiddenStates:
    """What is minimized inside of the student, and what is trained beside it for that: weight and map.

    `weight` None is automatic: what made the loss on hidden states as large as the divergence of the logits in the step
    before. That is one number on all ranks and stages, whatever the layout and the micro-batches, where the ratio of
    the same step would be known on the last stage alone and too late. In the first step it is 0.
    """

    def __init__(
        self,
        pairs: tuple[Pair, ...],
        loss: HiddenStateLoss,
        *,
        routes: tuple[Route, ...],
        head: HeadLoss,
        groups: Groups,
        weight: float | None = None,
        state_map: StateMap | None = None,
    ) -> None:
        self.pairs, self.routes = pairs, routes
        self.loss, self.head, self.groups, self.map = loss, head, groups, state_map
        self.is_automatic = weight is None
        self.weight = 0.0 if weight is None else weight
        self._teacher_taps = {pair.student: pair.teacher for pair in pairs}
        self._names = {pair.student.kind: f"{pair.student.kind}_{loss.divergence}" for pair in pairs}
        self._sums: dict[str, Tensor] = {}
        self._last: Mapping[str, float] = {}  # the sums of the newest global batch that was trained on
        self._compared: _Compared | None = None
        self._again: dict[Tap, deque[_Compared]] = defaultdict(deque)
        self._trains = False

    @property
    def sum_names(self) -> tuple[str, ...]:
        """One for each kind of states: the sum over its pairs."""
        return tuple(self._names.values())

    @property
    def in_words(self) -> str:
        weight = "automatic weight" if self.is_automatic else f"{self.weight:g}"
        parts = []
        for kind, name in self._names.items():
            pairs = ", ".join(str(pair) for pair in self.pairs if pair.student.kind == kind)
            parts.append(name if kind == EMBEDDINGS else f"{name} (teacher:student {pairs})")
        return f"{weight} x {' + '.join(parts)}"

    def flops_per_token(self, student: ModelArch, teacher: ModelArch) -> float:
        """FLOPs of the map in a training step; what else there is to a pair is no matrix product."""
        return 0.0 if self.map is None else 3 * 2 * student.hidden_size * teacher.hidden_size * len(self.pairs)

    @contextmanager
    def inside(self, model: ModelChunks, *, train: bool) -> Iterator[None]:
        """Inside, every forward pass of the student adds to the sums and, when `train`, to the gradient."""
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=self.groups.device) for name in self.sum_names}
        self._trains = train
        self._again.clear()
        with tapping(model, self._teacher_taps, self._hear):
            yield

    @contextmanager
    def around(self, batch: Batch, context: TeacherOutputs) -> Iterator[None]:
        """Around the forward pass of a micro-batch, this rank's part of it."""
        mask_SB = batch["loss_mask"].T
        if self.groups.sequence is not None:
            mask_SB = mask_SB.chunk(self.groups.layout.tp)[self.groups.tp_rank]
        self._compared = _Compared(mask_SB, context.taps)
        yield
        self._compared = None

    def _hear(self, tap: Tap, x_SBH: Tensor) -> Tensor | None:
        """The states, with their loss attached.

        What a recomputed layer gives is heard twice: without gradients in the forward pass, and in the backward pass,
        which takes the micro-batches of a chunk in the order of their forward passes.
        """
        wants_gradient = torch.is_grad_enabled()
        is_again = wants_gradient and bool(self._again[tap])
        compared = self._again[tap].popleft() if is_again else self._compared
        assert compared is not None
        if self._trains and not wants_gradient:
            self._again[tap].append(compared)
        total = self.loss(
            x_SBH,
            compared.teacher[self._teacher_taps[tap]],
            mask_SB=compared.mask_SB,
            map_GH=None if self.map is None else self.map.weight_GH,
        )
        if not is_again:
            self._sums[self._names[tap.kind]] += total.detach()
        return attached(x_SBH, self.weight * total) if wants_gradient and self.weight else None

    def own_sums(self) -> dict[str, Tensor]:
        """What this stage has added up inside of `inside`; the same bits on all its tensor-parallel ranks.

        They have slices of the sequence under sequence parallelism, else the same tokens: the sum of one of them.
        """
        if self.groups.tp is None:
            return self._sums
        values = torch.stack(list(self._sums.values()))
        dist.all_reduce(values, group=self.groups.tp)
        if self.groups.sequence is None:
            values /= self.groups.layout.tp
        return dict(zip(self._sums, values.unbind(), strict=True))

    def with_loss(self, sums: Mapping[str, float], *, train: bool) -> dict[str, float]:
        """The sums of a global batch with what the hidden states add to the loss, and the weight."""
        if train:
            self._last = dict(sums)
        own = self.weight * sum(sums[name] for name in self.sum_names)
        return {**sums, LOSS: sums[LOSS] + own, WEIGHT: self.weight * sums[TOKENS]}

    # What training changes beside the student: `training.state.TrainedBeside`.

    def start(self, optim: OptimConfig) -> None:
        if self.map is not None:
            self.map.start(optim)

    def zero_gradients(self) -> None:
        if self.map is not None:
            self.map.zero_gradient()

    def step(self, learning_rate: float) -> None:
        """The map's step, then the weight of the next: the ratio of what was summed up in this one."""
        sums = self._last
        if self.map is not None:
            self.map.step(tokens=sums[TOKENS], learning_rate=learning_rate)
        if self.is_automatic:
            own = sum(sums[name] for name in self.sum_names)
            self.weight = self.head.scale * sums[self.head.divergence.name] / own if own else 0.0

    def tensors(self) -> dict[str, Tensor]:
        state = {"weight": torch.tensor(self.weight, dtype=torch.float64)}
        return state if self.map is None else {**state, **{f"map.{n}": x for n, x in self.map.tensors().items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.weight = float(tensors["weight"])
        if self.map is not None:
            self.map.load({n.removeprefix("map."): x for n, x in tensors.items() if n.startswith("map.")})
