"""Running a step, the same for all recipes.

Describe instead when that was asked for, skip what is current, refuse what would be overwritten, start what the recipe
needs.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager

from minitron_nemo.artefacts.disk import writing
from minitron_nemo.artefacts.lock import locked
from minitron_nemo.artefacts.signature import trusting
from minitron_nemo.config.schema import Config
from minitron_nemo.distributed.ranks import is_main_process
from minitron_nemo.garbage import collect_from_here
from minitron_nemo.steps.step import Job, Recipe, logger


def execute(recipe: Recipe, config: Config) -> bool:
    """Run one step of a composed config; returns False when its output was there already."""
    with trusting(config.verify_key):
        return _execute(recipe, config)


def _execute(recipe: Recipe, config: Config) -> bool:
    recipe.check_config(config)
    if config.dry_run:
        from minitron_nemo.steps.describe import describe

        print(describe(recipe, config))
        return False
    recipe.check_machine(config)
    job = dataclasses.replace(recipe.prepare(config), overwrite=config.overwrite)
    if job.is_done:
        logger.info(f"{recipe.name}: {job.output} is done, nothing to do")
        return False
    job.check_output()
    started = time.monotonic()
    collect_from_here()
    with writing(job.output), _alone(job):
        recipe.start(config, job)
    logger.info(f"{recipe.name}: wrote {job.output} in {time.monotonic() - started:.0f} s")
    return True


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Keep other runs of the step from making the same output meanwhile; hours later would be late to find out."""
    if not is_main_process():
        yield
        return
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with locked(job.output, purpose="step"):
        yield
