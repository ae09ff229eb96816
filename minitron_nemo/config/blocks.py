"""Settings of the search for the layers to drop: blocks, measures and tasks."""

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from minitron_nemo.config.setting import count, path, setting
from minitron_nemo.config.shapes import MAX_LAYERS


class Measure(Enum):
    """What block removal is measured by on text; tasks are measured besides."""

    cosine = "cosine"
    lm_loss = "lm_loss"
    nmse = "nmse"


class TaskForm(Enum):
    winogrande = "winogrande"
    arc = "arc"
    hellaswag = "hellaswag"


@dataclass
class TaskConfig:
    form: TaskForm = setting(MISSING, "which fields its lines have: docs/method.md, section 2")
    input: str = path("a `.jsonl` file, an example a line", default=MISSING)
    num_examples: int | None = count(None, "the first so many; null: all", at_most=10**5, unit="examples")
    num_fewshot: int = count(0, "solved examples before each", at_least=0, at_most=100, unit="examples")
    fewshot: str | None = path("a file of the same form, whose first `num_fewshot` examples those are")
    normalized: bool | None = setting(
        None,
        "the score is `acc_norm`, by likelihood per character of the choice; false: `acc`; null: `acc` in winogrande, "
        "which has no other, else `acc_norm`",
    )


@dataclass
class ScoreBlocksConfig:
    """What becomes of the model without each contiguous block of layers (paper 1; paper 2; 2403.03853)."""

    checkpoint: str | None = path("model to score", place="corrected_teacher.nemo")
    output: str | None = path("folder of scores, table and plot", place="blocks")
    lengths: list[int] | None = count(
        None, "of the blocks; null: 1, and as many as `prune.target` drops", at_most=MAX_LAYERS, unit="layers"
    )
    measures: list[Measure] = setting(
        [Measure.cosine, Measure.lm_loss, Measure.nmse], "on calibration samples; `[]`: tasks alone"
    )
    tasks: dict[str, TaskConfig] = setting({}, "task name: what it is scored on, see below")
    add_bos: bool = setting(
        False, "begin every context of a task with the begin-of-sequence token; lm-evaluation-harness does not"
    )
    num_samples: int = count(
        128,
        "for calibration, each of `data.seq_length` tokens; a multiple of micro-batch x data-parallel ranks",
        unit="samples",
    )
    micro_batch_size: int = count(1, "in a forward pass", unit="samples", how_it_runs=True)
    chunk_tokens: int = count(1024, "whose logits exist at a time", unit="tokens", how_it_runs=True)
