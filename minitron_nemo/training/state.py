"""Everything that training changes, in one record: what a training checkpoint holds and a resumed run restores."""

from dataclasses import dataclass, field
from typing import Any

from minitron_nemo.config.schema import OptimConfig
from minitron_nemo.engine.model import BuildOptions, ModelChunks
from minitron_nemo.engine.optimizer import build_optimizer, build_schedule, wrap_data_parallel


@dataclass
class Position:
    """How far training is."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def advance(self, *, samples: int, tokens: int) -> None:
        """One step further."""
        self.step += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens


@dataclass
class TrainState:
    """The wrapped model, its optimizer, the learning-rate schedule and the position in the data."""

    model: ModelChunks
    optimizer: Any
    schedule: Any
    position: Position = field(default_factory=Position)

    @classmethod
    def start(cls, model: ModelChunks, optim: OptimConfig, *, max_steps: int, options: BuildOptions) -> "TrainState":
        """The state before the first step of a model whose weights are loaded."""
        wrapped = wrap_data_parallel(model, options)
        optimizer = build_optimizer(wrapped, optim, distributed_optimizer=options.distributed_optimizer)
        return cls(wrapped, optimizer, build_schedule(optimizer, optim, max_steps=max_steps))

    def zero_gradients(self) -> None:
        for chunk in self.model:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()

    def step(self) -> float:
        """Clip, step and advance the schedule; returns the gradient norm before clipping."""
        succeeded, grad_norm, _ = self.optimizer.step()
        assert succeeded, "the optimizer skipped a step, which only loss scaling does, and none is used here"
        self.schedule.step(increment=1)
        return float(grad_norm)

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])
