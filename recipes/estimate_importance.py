"""Estimate importance: score layers, heads, neurons and channels with forward passes (2407.14679)."""

from pathlib import Path

from minitron_nemo.checkpoint.manifest import begin, finish
from minitron_nemo.checkpoint.nemo import open_nemo
from minitron_nemo.cli import Job, Recipe, main, open_verified
from minitron_nemo.config import Config
from minitron_nemo.data.calibration import calibration_set
from minitron_nemo.engine.model import build_model
from minitron_nemo.engine.schedule import forward_hidden
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.importance.accumulators import RankGroups
from minitron_nemo.importance.listen import listening
from minitron_nemo.parallel import Groups
from minitron_nemo.progress import progress
from minitron_nemo.runs import check_data, check_model, check_samples, data_arguments, engine_of


def prepare(config: Config) -> Job:
    section = config.estimate_importance
    model = open_verified(section.checkpoint)
    check_model(config, "model", model, layers=config.parallel.teacher_stage_layers)
    check_samples(
        config, "estimate_importance", num_samples=section.num_samples, micro_batch_size=section.micro_batch_size
    )
    settings = dict(
        num_samples=section.num_samples,
        sequence_aggregation=section.sequence_aggregation.value,
        batch_aggregation=section.batch_aggregation.value,
        data=check_data(config, None, model),
    )
    return Job(Path(str(section.output)), "importance", settings, {"model": model.path})


def run(config: Config, job: Job, groups: Groups) -> None:
    section = config.estimate_importance
    source = open_nemo(section.checkpoint)
    calibration = calibration_set(config.data, num_samples=section.num_samples, **data_arguments(config, None, source))
    model = build_model(source.arch, engine_of(config, groups, layers=config.parallel.teacher_stage_layers))
    load_weights(model, source, groups)
    model.eval()
    ranks = RankGroups(tp=groups.tp, pp=groups.pp, dp=groups.dp, sequence_parallel=groups.sequence_parallel)
    mine = calibration.tokens.to(groups.device).chunk(groups.dp_size)[groups.dp_rank]
    with (
        listening(
            model, arch=source.arch, sequence_aggregation=section.sequence_aggregation.value, groups=ranks
        ) as statistics,
        progress(section.num_samples, "importance", unit="sample", enabled=groups.is_main) as bar,
    ):
        for tokens in mine.split(section.micro_batch_size):
            forward_hidden(model, [{"tokens": tokens}])
            bar.advance(len(tokens) * groups.dp_size)
    scores = statistics.finish(section.batch_aggregation.value, data_fingerprint=calibration.fingerprint)
    if groups.is_main:
        temp = begin(job.output, overwrite=job.overwrite)
        scores.write(temp)
        finish(temp, job.output, kind=job.kind, extra={"arch": source.arch.to_dict()}, **job.origin)


RECIPE = Recipe("estimate_importance", prepare, run, on_ranks=True)

if __name__ == "__main__":
    main(RECIPE)
