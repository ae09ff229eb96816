"""Running a step, the same for all recipes.

Describe instead when that was asked for, skip what is current, refuse what would be overwritten, start what the recipe
needs.
"""

import dataclasses
import time

from minitron_nemo.artefacts.disk import writing
from minitron_nemo.config.schema import Config
from minitron_nemo.steps.step import Recipe, logger


def execute(recipe: Recipe, config: Config) -> bool:
    """Run one step of a composed config; returns False when its output was there already."""
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
    with writing(job.output):
        recipe.start(config, job)
    logger.info(f"{recipe.name}: wrote {job.output} in {time.monotonic() - started:.0f} s")
    return True
