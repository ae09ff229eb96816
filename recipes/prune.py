"""Prune: turn scores and a target shape into a plan, and the plan into a smaller checkpoint (2407.14679).

Runs in one process on a checkpoint of any layout, a few tensors at a time; needs no GPU. Before the smaller checkpoint
is published it is proven to compute what its masked source computes.
"""

from pathlib import Path

from minitron_nemo.artefacts.origin import fingerprint_of
from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config, identity
from minitron_nemo.shape.arch import billions
from minitron_nemo.steps.describe import before_and_after, model_lines, shapes, target_lines
from minitron_nemo.steps.inputs import open_to_stream, require
from minitron_nemo.steps.planning import check_grid, needs_importance, plan_of
from minitron_nemo.steps.step import Job, Recipe, logger


def prepare(config: Config) -> Job:
    section = config.prune
    require(section.checkpoint)
    if needs_importance(config):
        require(section.importance, kind="importance")
    from minitron_nemo.checkpoint.formats.hf_config import export_doubt
    from minitron_nemo.steps.depth import depth_parents

    model = open_to_stream(section.checkpoint)
    plan = plan_of(config, model)
    check_grid(config, plan.target)
    for line in target_lines(config):
        logger.info(f"prune: {line.strip()}")
    if (doubt := export_doubt(plan.target, largest=model.arch.hidden_size)) is not None:
        logger.warning(f"prune: {doubt}")
    parents = {"model": model.path}
    if needs_importance(config):
        parents["importance"] = Path(str(section.importance))
    if section.plan is None:
        parents |= depth_parents(config)
    settings = {**identity(section), "plan": fingerprint_of(plan.to_json())}
    inputs = (Path(section.plan),) if section.plan else ()
    return Job(Path(str(section.output)), "model", settings, parents, inputs)


def run(config: Config, job: Job) -> None:
    from minitron_nemo.steps.prune import options_of, prune

    model = open_to_stream(config.prune.checkpoint)
    plan = plan_of(config, model)
    before, after = model.arch.num_params(), plan.target.num_params()
    logger.info(f"prune: {billions(before)} -> {billions(after)} parameters ({after / before:.1%}); {plan.describe()}")
    prune(model, plan, job.output, origin=job.origin, **options_of(config))


def lines(config: Config) -> list[str]:
    check_grid(config, shapes(config).student)
    return [*target_lines(config), *before_and_after(config), *model_lines(config, shapes(config).student)]


RECIPE = Recipe("prune", prepare, run, lines=lines)

if __name__ == "__main__":
    main(RECIPE)
