"""Pipeline: the recipes of a config in order, each skipped when its output is there already.

Interrupt it whenever you like and run the same command again: finished steps are skipped, and a training step goes on
from its last checkpoint.
"""

import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # recipes/ beside minitron_nemo/

from minitron_nemo.cli import Recipe, execute, logger, parse_arguments, run_safely, set_up_logging  # noqa: E402
from minitron_nemo.config import Config, compose  # noqa: E402
from minitron_nemo.errors import UserError  # noqa: E402
from minitron_nemo.parallel import rank_from_environment  # noqa: E402


def recipe_named(name: str) -> Recipe:
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "pipeline")
    if name not in known:
        raise UserError(f"pipeline.steps: no recipe {name!r}; there are {', '.join(known)}")
    recipe: Recipe = importlib.import_module(f"recipes.{name}").RECIPE
    return recipe


def steps_of(config: Config) -> Iterator[tuple[str, str, list[str]]]:
    """(label, recipe, overrides) of every step, those for several models unfolded."""
    for step in config.pipeline.steps:
        label = step.name or step.recipe
        if not step.models:
            yield label, step.recipe, step.overrides
        for model in step.models:
            yield f"{label} {model}", step.recipe, [text.replace("{model}", model) for text in step.overrides]


def run_pipeline(config_name: str, overrides: list[str], *, config_dir: Path) -> None:
    rank = rank_from_environment(dict(os.environ))
    if rank is not None and rank.world_size > 1:
        raise UserError(
            f"the pipeline starts its own ranks, but {rank.world_size} of it were started: start one, or submit the "
            "steps as jobs with launch/pipeline.sh"
        )
    config = compose(config_name, overrides, recipe="pipeline", config_dir=config_dir)
    started = time.monotonic()
    # Every step is composed, and so checked, before the first runs.
    steps = [
        (label, recipe_named(recipe), compose(config_name, [*overrides, *more], recipe=recipe, config_dir=config_dir))
        for label, recipe, more in steps_of(config)
    ]
    for number, (label, recipe, step_config) in enumerate(steps, start=1):
        logger.info(f"[{number}/{len(steps)}] {label}")
        execute(recipe, step_config)
    logger.info(f"pipeline: {len(steps)} steps in {time.monotonic() - started:.0f} s")


def main() -> int:
    options = parse_arguments("pipeline", description=__doc__ or "", arguments=sys.argv[1:])
    set_up_logging()
    return run_safely(lambda: run_pipeline(options.config_name, options.overrides, config_dir=options.config_dir))


if __name__ == "__main__":
    sys.exit(main())
