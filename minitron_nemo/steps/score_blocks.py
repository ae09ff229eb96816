"""One search over contiguous blocks of layers: a model in, what becomes of it without each block out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.data.calibration import CalibrationSet
from minitron_nemo.data.tasks import TaskRun
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.removal import RemovalRuns
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.evaluation.removal import OnLastStage, TextSums, log_likelihoods
from minitron_nemo.importance.block_cosine import BlockCosines
from minitron_nemo.importance.blocks import (
    COSINE,
    LM_LOSS,
    NMSE,
    TASK,
    BlockScores,
    Values,
    blocks_of,
    layer_evaluations,
)
from minitron_nemo.importance.calibration_text import write_text
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.steps.kept_sums import KeptSums
from minitron_nemo.steps.rounds import Rounds

ON_TEXT = (COSINE, LM_LOSS, NMSE)  # the measures of one pass over calibration samples


def score_blocks(
    weights: TensorSource,
    calibration: CalibrationSet | None,
    *,
    options: BuildOptions,
    lengths: Sequence[int],
    measures: Sequence[str] = ON_TEXT,
    tasks: Mapping[str, TaskRun] | None = None,
    micro_batch_size: int = 1,
    chunk_tokens: int = 1024,
    kept: KeptSums | None = None,
) -> BlockScores:
    """Scores of every block of these lengths by these measures of the calibration samples, and by the tasks.

    The same on every rank; on all ranks. Cosine is taken of blocks of every length: it costs no pass of its own.
    With `kept` sums are saved as they grow, and those of a run that stopped are gone on from.
    """
    arch, groups = weights.arch, options.groups
    model = build_model(arch, options)
    load_weights(model, weights, groups)
    search = _Search(
        runs=RemovalRuns(model),
        stages=groups.layout.stages(arch.num_layers, options.stage_layers),
        blocks=blocks_of(arch.num_layers, lengths),
        head=HeadLoss(vocab_size=arch.vocab_size, chunk_tokens=chunk_tokens, group=groups.tp),
        groups=groups,
        rounds=Rounds(groups, micro_batch_size, kept),
    )
    values: dict[str, Values] = {}
    whole: dict[str, float] = {}
    facts: dict[str, Any] = {"layer_evaluations": layer_evaluations(arch.num_layers, lengths)}
    if calibration is not None:
        by_measure, whole = search.on_text(calibration, measures)
        values |= {measure: by_measure[measure] for measure in measures}
        facts |= dict(zip(("num_samples", "seq_length"), calibration.tokens.shape, strict=True))
        facts |= {"tokens": calibration.tokens.numel(), "data_fingerprint": calibration.fingerprint}
    told = {name: search.on_task(run, name) for name, run in (tasks or {}).items()}
    if told:
        each = [of_task["scores"] for of_task in told.values()]
        columns = {n: zip(*(scores[n] for scores in each), strict=True) for n in lengths}
        values[TASK] = {n: [math.fsum(column) / len(each) for column in columns[n]] for n in lengths}
        whole[TASK] = math.fsum(of_task["whole"] for of_task in told.values()) / len(told)
    return BlockScores(arch, list(lengths), values, whole=whole, tasks=told, facts=facts)


def write_blocks(folder: Path, scores: BlockScores, calibration: CalibrationSet | None) -> None:
    """Write scores, and a little of the text that they are of, into an existing folder."""
    scores.write(folder)
    if calibration is not None:
        write_text(folder, calibration.tokens)


@dataclass(frozen=True)
class _Search:
    """What all measures of one model share; every method on all ranks, its result the same on every rank."""

    runs: RemovalRuns
    stages: list[int]
    blocks: list[range]
    head: HeadLoss
    groups: Groups
    rounds: Rounds

    def on_text(
        self, calibration: CalibrationSet, measures: Sequence[str]
    ) -> tuple[dict[str, Values], dict[str, float]]:
        """Values by measure, and the language-model loss of the whole model."""
        groups = self.groups
        # The cosine needs no block removed.
        removed = self.blocks if {LM_LOSS, NMSE} & set(measures) else []
        sums = TextSums(self.runs, removed, head=self.head, groups=groups)
        cosines = BlockCosines(self.stages, groups)

        def work(numbers: range) -> None:
            sums.add(calibration.batch(numbers.start, len(numbers), device=groups.device))
            if COSINE in measures:
                cosines.add(self.runs.states)

        self.rounds.go(len(calibration.tokens), "blocks", unit="sample", sums=[sums, cosines], work=work)
        tokens_V, loss_V, distance_V, norm_V = sums.merged().cpu().unbind(dim=1)
        loss_V = loss_V / tokens_V
        by_measure = {
            COSINE: _all_lengths(cosines.scores().cpu()),
            LM_LOSS: self._by_length(loss_V[1:].tolist()),
            NMSE: self._by_length((distance_V / norm_V)[1:].tolist()),
        }
        return by_measure, {LM_LOSS: float(loss_V[0])}

    def on_task(self, run: TaskRun, name: str) -> dict[str, Any]:
        """The accuracies of a task without each block, as plain values; `scores` and `whole` are of its metric."""
        groups, requests = self.groups, run.requests
        # Neighbours of equal length need no padding.
        order = sorted(range(len(requests)), key=lambda number: len(requests[number].inputs))
        table_RV = OnLastStage(len(requests), 1 + len(self.blocks), groups=groups)

        def work(places: range) -> None:
            numbers = [order[place] for place in places]
            some = [requests[number] for number in numbers]
            table_RV.values[numbers] = log_likelihoods(
                self.runs, some, blocks=self.blocks, head=self.head, groups=groups
            )

        self.rounds.go(len(requests), f"task_{name}", unit="choice", sums=[table_RV], work=work)
        accuracies = [run.task.accuracies(column) for column in table_RV.merged().T.tolist()]
        return {
            "form": run.task.form,
            "metric": run.metric,
            "examples": len(run.task.examples),
            "fingerprint": run.task.fingerprint,
            "whole": accuracies[0][run.metric],
            "scores": self._by_length([each[run.metric] for each in accuracies[1:]]),
            "accuracies": {
                metric: {"whole": accuracies[0][metric], **self._by_length([each[metric] for each in accuracies[1:]])}
                for metric in accuracies[0]
            },
        }

    def _by_length(self, values: Sequence[float]) -> Values:
        """A value for each block, by its length; empty where no block was removed."""
        found: Values = {}
        for block, value in zip(self.blocks, values, strict=False):
            found.setdefault(len(block), []).append(value)
        return found


def _all_lengths(table: Tensor) -> Values:
    """[L, L + 1] by first layer and end, as values by length."""
    total = table.shape[0]
    return {n: [float(table[start, start + n]) for start in range(total - n + 1)] for n in range(1, total + 1)}
