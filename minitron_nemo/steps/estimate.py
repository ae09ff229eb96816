"""One pass over calibration samples: a model in, its importance scores out."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial

import torch

from minitron_nemo.checkpoint.formats.nemo import NemoFolder
from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.config.importance import EstimateImportanceConfig
from minitron_nemo.config.schema import Config
from minitron_nemo.data.calibration import CalibrationSet
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.distributed.stopping import finishing
from minitron_nemo.engine.gradients import gradients_of_activations
from minitron_nemo.engine.model import BuildOptions, ModelChunks, build_model
from minitron_nemo.engine.schedule import Batch, calls, forward_hidden, run_schedule
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.errors import StoppedError, UserError
from minitron_nemo.importance.criteria import chosen
from minitron_nemo.importance.hooks import listening
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.importance.second_moments import SecondMomentFile, listening_to_second_moments
from minitron_nemo.importance.sums import Heard, ImportanceSums, read_sums, stretches
from minitron_nemo.losses.lm_head import HeadLoss
from minitron_nemo.progress import progress
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.steps.kept_sums import KeptSums
from minitron_nemo.steps.score_folders import Estimated
from minitron_nemo.steps.settings import precision_in_words
from minitron_nemo.training.objectives import LanguageModelObjective


@dataclass(frozen=True)
class Estimate:
    """How importance is estimated: by which criteria (axis: name, the others by their default), on which samples."""

    criteria: Mapping[str, str] | None = None
    sequence_aggregation: str = "mean"
    samples: range | None = None  # of the calibration set; None: all
    micro_batch_size: int = 1
    save_every_n_samples: int = 64
    second_moments: bool = False  # of the same passes, for repairs


def estimate_of(section: EstimateImportanceConfig) -> Estimate:
    """How a config asks for importance to be estimated."""
    return Estimate(
        criteria=section.criteria.named(),
        sequence_aggregation=section.sequence_aggregation.value,
        samples=section.samples,
        micro_batch_size=section.micro_batch_size,
        save_every_n_samples=section.save_every_n_samples,
        second_moments=section.second_moments,
    )


def check_interleaved(section: EstimateImportanceConfig, layout: Layout) -> None:
    """Refuse samples of which an interleaved pipeline would get a number of micro-batches that it cannot take."""
    step = section.micro_batch_size * layout.pp
    cuts = stretches(section.samples, set_samples=section.num_samples, at_most=section.save_every_n_samples)
    for stretch, rank in itertools.product(cuts, range(layout.dp)):
        if (size := len(layout.share_of(stretch, rank))) % step:
            raise UserError(
                f"estimate_importance.num_samples={section.num_samples}: of samples {stretch.start} to "
                f"{stretch.stop - 1} a data-parallel rank has {size}; the interleaved pipeline needs a multiple of "
                f"micro_batch_size x pipeline_model_parallel_size = {step} between two saves, or "
                "virtual_pipeline_model_parallel_size=1"
            )


def heard_by(config: Config, model: NemoFolder, calibration: CalibrationSet) -> Heard:
    """What the sums of this config are sums of: the facts by which other jobs' sums add up to them, or do not."""
    return Heard(
        data=calibration.fingerprint,
        set_samples=len(calibration.tokens),
        seq_length=calibration.tokens.shape[1],
        tokenizer=load_tokenizer(model.tokenizer).fingerprint,
        model=model.sha256,
        precision=precision_in_words(config),
    )


def estimate_importance(
    weights: TensorSource,
    calibration: CalibrationSet,
    *,
    options: BuildOptions,
    micro_batch_size: int = 1,
    sequence_aggregation: str = "mean",
    batch_aggregation: str = "l2",
    criteria: Mapping[str, str] | None = None,
) -> ImportanceScores:
    """Scores of every axis, the same on every rank; on all ranks (paper 1). By default from forward passes alone."""
    how = Estimate(criteria, sequence_aggregation, micro_batch_size=micro_batch_size)
    return estimate(weights, calibration, how, options=options, batch_aggregation=batch_aggregation).scores


def estimate(
    weights: TensorSource,
    calibration: CalibrationSet,
    how: Estimate,
    *,
    options: BuildOptions,
    batch_aggregation: str = "l2",
    heard: Heard | None = None,
    kept: KeptSums | None = None,
) -> Estimated:
    """Sums, the scores that they come to, and second moments where they are wanted; the same on every rank, on all.

    With `kept` sums are saved as they grow, and those of a run that stopped are gone on from. Raises StoppedError when
    it was asked to stop, after the samples that it was at are saved.
    """
    groups, set_samples = options.groups, len(calibration.tokens)
    samples = range(set_samples) if how.samples is None else how.samples
    criteria = chosen(how.criteria)
    heard = heard or Heard(calibration.fingerprint, set_samples, calibration.tokens.shape[1])
    begun, _ = (kept.newest(groups) if kept is not None else None) or (None, 0)
    sums = read_sums(begun) if begun else ImportanceSums(weights.arch, criteria, how.sequence_aggregation, heard)
    found = Estimated(sums, batch_aggregation, calibration.tokens[samples.start : samples.stop])
    left = samples[sums.num_samples :]
    needs_gradients = any(criterion.gradients for criterion in criteria.values())
    model = _loaded(weights, options)
    with (
        ExitStack() as stack,
        gradients_of_activations(model) if needs_gradients else nullcontext(),
        finishing() if kept is not None else nullcontext(lambda: False) as asked,
        listening(
            model,
            arch=weights.arch,
            sequence_aggregation=how.sequence_aggregation,
            groups=groups,
            criteria=criteria,
        ) as statistics,
        progress(len(samples), "importance", unit="sample", done=sums.num_samples, enabled=groups.is_main) as bar,
    ):
        moments = None
        if how.second_moments:
            moments = stack.enter_context(listening_to_second_moments(model, arch=weights.arch, groups=groups))
            found = dataclasses.replace(found, second_moments=moments.tensors)
            if begun:
                moments.restore(SecondMomentFile(begun, weights.arch))
        run = _passes(model, arch=weights.arch, groups=groups, backward=needs_gradients)
        for stretch in stretches(left, set_samples=set_samples, at_most=how.save_every_n_samples):
            mine = groups.layout.share_of(stretch, groups.dp_rank)
            for batches in _calls(calibration, mine, how.micro_batch_size, options=options):
                run(batches)
                bar.advance(sum(len(batch["tokens"]) for batch in batches) * groups.layout.dp)
            found = dataclasses.replace(found, sums=found.sums.add(statistics.take(stretch)))
            if kept is None or stretch.stop == samples.stop:
                continue
            kept.save(stretch.stop, partial(found.write_sums, dtype=torch.float64), groups)
            if any(groups.any_rank(asked())):
                done = f"{found.sums.num_samples} of {len(samples)}"
                raise StoppedError(f"importance after {done} samples, saved as asked")
    return found


def _loaded(weights: TensorSource, options: BuildOptions) -> ModelChunks:
    """What hooks hear must be computed once."""
    model = build_model(weights.arch, options.computing_once())
    load_weights(model, weights, options.groups)
    return model.eval()


def _passes(model: ModelChunks, *, arch: ModelArch, groups: Groups, backward: bool) -> Callable[[list[Batch]], None]:
    """What runs micro-batches: forward alone, or the language-model loss forward and `backward`.

    The loss is the cross-entropy of every token with the next, summed.
    """
    if not backward:

        def forward(batches: list[Batch]) -> None:
            forward_hidden(model, batches)

        return forward
    head = HeadLoss(vocab_size=arch.vocab_size, kl_weight=0.0, cross_entropy_weight=1.0, group=groups.tp)
    objective = LanguageModelObjective(head)

    def run(batches: list[Batch]) -> None:
        labelled = [batch if "labels" in batch else _labelled(batch) for batch in batches]
        run_schedule(model, labelled, contexts=objective.contexts, loss=objective.loss, train=True)

    return run


def _labelled(batch: Batch) -> Batch:
    """Of tokens alone each predicts the next, and the last none."""
    mask = torch.ones_like(batch["tokens"], dtype=torch.float32)
    mask[:, -1] = 0.0
    return {**batch, "labels": batch["tokens"].roll(-1, dims=1), "loss_mask": mask}


def _calls(
    calibration: CalibrationSet, samples: range, micro_batch_size: int, *, options: BuildOptions
) -> Iterator[list[Batch]]:
    """The micro-batches of each call of the schedule; those of one call have the same number of samples."""
    groups = options.groups
    whole = len(samples) // micro_batch_size * micro_batch_size
    for part, size in ((samples[:whole], micro_batch_size), (samples[whole:], len(samples) - whole)):
        firsts: Sequence[int] = part[:: max(size, 1)]
        for some in calls(firsts, stages=groups.layout.pp):
            yield [calibration.batch(first, size, device=groups.device) for first in some]
