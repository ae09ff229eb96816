"""The steps of a pipeline, unfolded, composed and checked before the first of them runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from minitron_nemo.config.compose import Composition
from minitron_nemo.config.schema import Config
from minitron_nemo.steps.step import Recipe


@dataclass(frozen=True)
class Step:
    """One step of a pipeline: what the log calls it, the overrides of its own, and its composed config."""

    label: str
    recipe: Recipe
    overrides: tuple[str, ...]
    config: Config


def steps_of(composition: Composition, config: Config, *, find: Callable[[str], Recipe]) -> list[Step]:
    """Every step of a config's pipeline, those for several models unfolded; `find` gives a recipe by its name.

    Raises UserError for the first step whose settings do not go together.
    """
    steps = []
    for label, name, overrides in _unfolded(config):
        recipe, own = find(name), composition.compose(*overrides)
        recipe.check_config(own)
        steps.append(Step(label, recipe, tuple(overrides), own))
    return steps


def _unfolded(config: Config) -> Iterator[tuple[str, str, list[str]]]:
    """(label, recipe, overrides) of every step."""
    for step in config.pipeline.steps:
        label = step.name or step.recipe
        if not step.models:
            yield label, step.recipe, step.overrides
        for model in step.models:
            yield f"{label} {model}", step.recipe, [text.replace("{model}", model) for text in step.overrides]
