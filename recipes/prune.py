"""Prune: turn scores and a target shape into a plan, and the plan into a smaller checkpoint (2407.14679).

Runs in one process without a GPU on a checkpoint of any layout, a few tensors at a time.
"""

from pathlib import Path

from minitron_nemo.arch import billions
from minitron_nemo.checkpoint.manifest import fingerprint_of, read_manifest
from minitron_nemo.checkpoint.nemo import open_nemo, write_nemo
from minitron_nemo.cli import Job, Recipe, logger, main, open_verified
from minitron_nemo.config import Config
from minitron_nemo.importance.scores import read_scores
from minitron_nemo.parameters import logical_tensors
from minitron_nemo.progress import progress
from minitron_nemo.pruning.apply import pruned_tensors
from minitron_nemo.pruning.plan import PruningPlan, make_plan, read_plan


def plan_of(config: Config) -> PruningPlan:
    """The plan given as a file, or made from the scores and the target shape."""
    section = config.prune
    arch = open_nemo(section.checkpoint).arch
    if section.plan is not None:
        plan = read_plan(section.plan)
        plan.check_source(arch, name=section.plan)
        return plan
    target = section.target.shrink(arch)
    read_manifest(str(section.importance), kind="importance")
    scores = read_scores(str(section.importance))
    return make_plan(scores, target, drop_layers=section.target.drop_layers)


def prepare(config: Config) -> Job:
    section = config.prune
    model, plan = open_verified(section.checkpoint), plan_of(config)
    plan.check_source(model.arch, name=f"importance {section.importance}")
    if plan.target.family == "llama" and plan.target.hidden_size % plan.target.num_attention_heads:
        logger.warning(
            f"prune: hidden_size={plan.target.hidden_size} is no multiple of num_attention_heads="
            f"{plan.target.num_attention_heads}: transformers 5 will not open an export of this Llama"
        )
    parents = {"model": model.path}
    if section.plan is None:
        parents["importance"] = Path(str(section.importance))
    return Job(Path(str(section.output)), "model", {"plan": fingerprint_of(plan.to_json())}, parents)


def run(config: Config, job: Job) -> None:
    source, plan = open_nemo(config.prune.checkpoint), plan_of(config)
    before, after = source.arch.num_params(), plan.target.num_params()
    logger.info(f"prune: {billions(before)} -> {billions(after)} parameters ({after / before:.1%}); {plan.describe()}")
    with progress(len(logical_tensors(plan.target)), "prune", unit="tensor") as bar:
        write_nemo(
            job.output,
            plan.target,
            tensors=pruned_tensors(source.read, plan),
            tokenizer=source.tokenizer,
            dtype=source.dtype,
            progress=lambda done, total: bar.advance(),
            files={"plan.json": plan.to_json().encode()},
            **job.origin,
        )


RECIPE = Recipe("prune", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
