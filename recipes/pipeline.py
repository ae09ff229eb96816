"""Pipeline: the recipes of a config in order, each skipped when its output is there already.

Interrupt it whenever you like and run the same command again: finished steps are skipped, and a training step goes on
from its last checkpoint. `--jobs` prints the steps, one on a line, for launchers that start each as a job of its own.
"""

import importlib
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # recipes/ beside minitron_nemo/

from minitron_nemo.cli import leave, run_task  # noqa: E402
from minitron_nemo.config.compose import Composition  # noqa: E402
from minitron_nemo.config.schema import Config  # noqa: E402
from minitron_nemo.errors import UserError  # noqa: E402
from minitron_nemo.steps.chain import steps_of  # noqa: E402
from minitron_nemo.steps.execute import execute  # noqa: E402
from minitron_nemo.steps.step import Recipe, logger  # noqa: E402


def recipe_named(name: str) -> Recipe:
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in ("pipeline", "audit"))
    if name not in known:
        raise UserError(f"pipeline.steps: no recipe {name!r}; there are {', '.join(known)}")
    recipe: Recipe = importlib.import_module(f"recipes.{name}").RECIPE
    return recipe


def run_pipeline(composition: Composition, config: Config) -> None:
    from minitron_nemo.distributed.ranks import rank_from_environment

    rank = rank_from_environment()
    if rank is not None and rank.world_size > 1:
        raise UserError(
            f"the pipeline starts its own ranks, but {rank.world_size} of it were started: start one, or submit the "
            "steps as jobs with launch/pipeline.sh"
        )
    started = time.monotonic()
    steps = steps_of(composition, config, find=recipe_named)
    if config.pipeline.notice is not None:
        logger.info(config.pipeline.notice)
    for number, step in enumerate(steps, start=1):
        logger.info(f"[{number}/{len(steps)}] {step.label}")
        execute(step.recipe, step.config)
    logger.info(f"pipeline: {len(steps)} steps in {time.monotonic() - started:.0f} s")


def print_jobs(composition: Composition, config: Config) -> None:
    """One line for each step: `one` or `ranks`, its label, its recipe, its own overrides; tabs between them."""
    for step in steps_of(composition, config, find=recipe_named):
        print(step.recipe.processes, step.label, step.recipe.name, *step.overrides, sep="\t")


def main(arguments: list[str]) -> int:
    if arguments == ["--processes"]:
        print("one")
        return 0
    task = print_jobs if "--jobs" in arguments else run_pipeline
    return run_task("pipeline", __doc__ or "", task=task, arguments=[word for word in arguments if word != "--jobs"])


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
