"""One pass over calibration samples: a model in, its importance scores out."""

from minitron_nemo.checkpoint.source import TensorSource
from minitron_nemo.data.calibration import CalibrationSet
from minitron_nemo.engine.model import BuildOptions, build_model
from minitron_nemo.engine.schedule import calls, forward_hidden
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.importance.hooks import listening
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.progress import progress


def estimate_importance(
    weights: TensorSource,
    calibration: CalibrationSet,
    *,
    options: BuildOptions,
    micro_batch_size: int = 1,
    sequence_aggregation: str = "mean",
    batch_aggregation: str = "l2",
) -> ImportanceScores:
    """Scores of every axis from forward passes alone, the same on every rank; on all ranks (paper 1)."""
    groups = options.groups
    model = build_model(weights.arch, options)
    load_weights(model, weights, groups)
    model.eval()
    num_samples = len(calibration.tokens)
    share = groups.layout.share(num_samples, micro_batch_size, name="num_samples")
    with (
        listening(model, arch=weights.arch, sequence_aggregation=sequence_aggregation, groups=groups) as statistics,
        progress(num_samples, "importance", unit="sample", enabled=groups.is_main) as bar,
    ):
        for some in calls(share.first_samples(groups.dp_rank), stages=groups.layout.pp):
            forward_hidden(model, [calibration.batch(first, micro_batch_size, device=groups.device) for first in some])
            bar.advance(len(some) * micro_batch_size * groups.layout.dp)
    return statistics.finish(batch_aggregation, data_fingerprint=calibration.fingerprint)
