"""Prune: turn scores and a target shape into a plan, and the plan into a smaller checkpoint (2407.14679).

Runs in one process without a GPU on a checkpoint of any layout, a few tensors at a time.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from minitron_nemo.artefacts.manifest import read_manifest, verify_files
from minitron_nemo.artefacts.origin import fingerprint_of
from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config, identity
from minitron_nemo.shape.arch import billions
from minitron_nemo.steps.describe import model_lines, shapes
from minitron_nemo.steps.inputs import open_verified, require
from minitron_nemo.steps.step import Job, Recipe, logger

if TYPE_CHECKING:
    from minitron_nemo.pruning.plan import PruningPlan


def plan_of(config: Config) -> "PruningPlan":
    """The plan given as a file, or made from the scores and the target shape; for the model that is cut."""
    # torch takes seconds to import: not before there is something to cut.
    from minitron_nemo.checkpoint.formats.nemo import open_nemo
    from minitron_nemo.importance.scores import read_scores
    from minitron_nemo.pruning.make_plan import make_plan
    from minitron_nemo.pruning.plan import read_plan

    section = config.prune
    arch = open_nemo(str(section.checkpoint)).arch
    if section.plan is not None:
        plan = read_plan(section.plan)
        plan.check_source(arch, name=section.plan)
        return plan
    target = section.target.shrink(arch)
    # One flipped bit of a score is another model.
    verify_files(str(section.importance), read_manifest(str(section.importance), kind="importance"))
    scores = read_scores(str(section.importance))
    plan = make_plan(scores, target, drop_layers=section.target.drop_layers)
    plan.check_source(arch, name=f"importance {section.importance}")
    return plan


def prepare(config: Config) -> Job:
    section = config.prune
    require(section.checkpoint)
    if section.plan is None:
        require(section.importance, kind="importance")
    from minitron_nemo.checkpoint.formats.hf_config import export_doubt

    model, plan = open_verified(section.checkpoint), plan_of(config)
    if (doubt := export_doubt(plan.target, largest=model.arch.hidden_size)) is not None:
        logger.warning(f"prune: {doubt}")
    parents = {"model": model.path}
    if section.plan is None:
        parents["importance"] = Path(str(section.importance))
    settings = {**identity(section), "plan": fingerprint_of(plan.to_json())}
    inputs = (Path(section.plan),) if section.plan else ()
    return Job(Path(str(section.output)), "model", settings, parents, inputs)


def run(config: Config, job: Job) -> None:
    from minitron_nemo.checkpoint.formats.nemo import open_nemo
    from minitron_nemo.steps.prune import prune

    model, plan = open_nemo(str(config.prune.checkpoint)), plan_of(config)
    before, after = model.arch.num_params(), plan.target.num_params()
    logger.info(f"prune: {billions(before)} -> {billions(after)} parameters ({after / before:.1%}); {plan.describe()}")
    prune(model, plan, job.output, origin=job.origin)


RECIPE = Recipe("prune", prepare, run, lines=lambda config: model_lines(config, shapes(config).student))

if __name__ == "__main__":
    main(RECIPE)
