"""What a prune step cuts by: the plan that its config gives or that scores and target make."""

import dataclasses
from typing import TYPE_CHECKING

from minitron_nemo.artefacts.manifest import read_manifest, verify_files
from minitron_nemo.config.schema import Config
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.shape.axes import AXES

if TYPE_CHECKING:
    from torch import Tensor

    from minitron_nemo.checkpoint.formats.nemo import NemoFolder
    from minitron_nemo.importance.scores import ImportanceScores
    from minitron_nemo.pruning.plan import PruningPlan

WORDS = "vocab_size"


def plan_of(config: Config, model: "NemoFolder") -> "PruningPlan":
    """The plan given as a file, or made from the scores and the target shape; for the model that is cut."""
    # torch takes seconds to import: not before there is something to cut.
    from minitron_nemo.pruning.make_plan import make_plan
    from minitron_nemo.pruning.plan import read_plan
    from minitron_nemo.steps.depth import layers_to_drop

    section = config.prune
    if needs_importance(config):
        # One flipped bit of a score is another model.
        verify_files(str(section.importance), read_manifest(str(section.importance), kind="importance"))
    if section.plan is not None:
        plan = read_plan(section.plan)
        plan.check_source(model.arch, name=section.plan)
        return plan
    target = config.fit(model.arch).arch
    plan = make_plan(_scores(config, model, target), target, drop_layers=layers_to_drop(config, model.arch))
    plan.check_source(model.arch, name=f"importance {section.importance}")
    return plan


def needs_importance(config: Config) -> bool:
    """Whether a cut goes by scores of importance, as repairs do.

    Not where a plan is there, where words go by their frequency, and where layers go by a list or by scores of blocks.
    """
    target = config.prune.target
    if config.prune.repairs.any or config.prune.plan is not None:
        return config.prune.repairs.any
    shrunk = {axis for axis in AXES if getattr(target, axis) is not None}
    if target.budget is not None:
        shrunk |= set(target.budget.axes)
    by_other = {WORDS, "num_layers"} if target.drop_by or target.drop_layers else {WORDS}
    return bool(shrunk - by_other)


def check_grid(config: Config, target: ModelArch) -> None:
    """Refuse a shape that the config's tensor-parallel ranks could not share, before a model of it is made."""
    Layout(tp=config.parallel.tensor_model_parallel_size).check(target, name="pruned model")


def _scores(config: Config, model: "NemoFolder", target: ModelArch) -> "ImportanceScores":
    """The scores, if any are needed, and those of the words, if some go."""
    from minitron_nemo.importance.scores import ImportanceScores, read_scores

    scores = ImportanceScores(model.arch, {}, 0, 0, "", "")
    if needs_importance(config):
        scores = read_scores(str(config.prune.importance))
    if target.vocab_size == model.arch.vocab_size:
        return scores
    words = {WORDS: word_scores(config, model, target.vocab_size)}
    return dataclasses.replace(scores, by_axis={**scores.by_axis, **words})


def word_scores(config: Config, model: "NemoFolder", size: int) -> "Tensor":
    """Scores of the vocabulary, [vocab_size] float64: any number of the highest is closed under the merges.

    By the frequency in the training part of `distill.blend`, or `data.blend`; no forward pass. Refuses a size without
    room for what must stay.
    """
    import torch

    from minitron_nemo.data.token_counts import token_frequencies
    from minitron_nemo.data.vocabulary import read_vocabulary
    from minitron_nemo.steps.settings import blend_for

    vocabulary = read_vocabulary(model.tokenizer, size=model.arch.vocab_size)
    vocabulary.check_size(size)
    frequencies = token_frequencies(blend_for(config, model, weights=config.distill.blend))
    ranked = torch.tensor(vocabulary.ranked(frequencies.tolist()))
    scores = torch.empty(len(ranked), dtype=torch.float64)
    scores[ranked] = torch.arange(len(ranked), 0, -1, dtype=torch.float64)
    return scores
