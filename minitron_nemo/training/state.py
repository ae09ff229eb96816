"""Everything that training changes, in one record: what a training checkpoint holds and a resumed run restores."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.engine.model import BuildOptions, ModelChunks
from minitron_nemo.engine.optimizer import build_optimizer, build_schedule, wrap_data_parallel


@dataclass
class Position:
    """How far training is."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0  # of the steps, those whose gradient was dropped
    skipped_in_a_row: int = 0  # up to now

    def advance(self, *, samples: int, tokens: int) -> None:
        """One step further."""
        self.step += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        self.skipped_in_a_row = 0

    def skip(self, *, samples: int) -> None:
        """One step further, of which the model learnt nothing."""
        in_a_row = self.skipped_in_a_row + 1
        self.advance(samples=samples, tokens=0)
        self.skipped_steps += 1
        self.skipped_in_a_row = in_a_row


class TrainedBeside(Protocol):
    """What is trained beside the model, the same on every rank, and is no part of it: of checkpoints, not of models."""

    def start(self, optim: OptimConfig) -> None:
        """Called once, before the first step."""

    def zero_gradients(self) -> None: ...

    def step(self, learning_rate: float) -> None:
        """Called with every step of the optimizer. Collective."""

    def tensors(self) -> Mapping[str, Tensor]:
        """All that steps change."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `tensors`."""


@dataclass
class TrainState:
    """The wrapped model and what is trained beside it, the optimizer and its schedule, the position in the data."""

    model: ModelChunks
    optimizer: Any
    schedule: Any
    position: Position = field(default_factory=Position)
    beside: TrainedBeside | None = None

    @classmethod
    def start(
        cls,
        model: ModelChunks,
        optim: OptimConfig,
        *,
        max_steps: int,
        options: BuildOptions,
        beside: TrainedBeside | None = None,
    ) -> "TrainState":
        """The state before the first step of a model whose weights are loaded."""
        if beside is not None:
            beside.start(optim)
        wrapped = wrap_data_parallel(model, options)
        optimizer = build_optimizer(wrapped, optim, distributed_optimizer=options.distributed_optimizer)
        return cls(wrapped, optimizer, build_schedule(optimizer, optim, max_steps=max_steps), beside=beside)

    def zero_gradients(self) -> None:
        for chunk in self.model:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        if self.beside is not None:
            self.beside.zero_gradients()

    def gradient_norm(self) -> float:
        """That of the gradient as it is, on every rank; changes nothing that `step` goes by. Collective."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def skip(self) -> None:
        """Drop the gradient: weights and moments stay, the learning rate goes by the steps."""
        self.zero_gradients()
        self.schedule.step(increment=1)

    def step(self) -> float:
        """Clip, step and advance the schedule; returns the gradient norm before clipping."""
        if self.beside is not None:
            self.beside.step(self.learning_rate)
        succeeded, grad_norm, _ = self.optimizer.step()
        assert succeeded, "the optimizer skipped a step, which only loss scaling does, and none is used here"
        self.schedule.step(increment=1)
        return float(grad_norm)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])
