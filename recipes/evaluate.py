"""Evaluate: loss and perplexity on held-out text, and closeness to the reference model (the corrected teacher)."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_nemo.artefacts.records import write_record
from minitron_nemo.cli import main
from minitron_nemo.config.rules import check_samples
from minitron_nemo.config.schema import Config
from minitron_nemo.steps.describe import weight_lines
from minitron_nemo.steps.inputs import check_model, open_verified, weights_beside
from minitron_nemo.steps.on_ranks import RankRecipe
from minitron_nemo.steps.settings import blend_for, settings_of
from minitron_nemo.steps.step import Job, logger

if TYPE_CHECKING:
    from minitron_nemo.distributed.groups import Groups


def check(config: Config) -> None:
    section = config.evaluate
    check_samples(config.layout, section.num_samples, section.micro_batch_size, name="evaluate.num_samples")


def prepare(config: Config) -> Job:
    section = config.evaluate
    model, reference = open_verified(section.checkpoint), open_verified(section.reference)
    weights_beside(model, reference)  # or a refusal
    check_model(config, model)
    check_model(config, reference, name="reference")
    blend = blend_for(config, model, weights=section.blend)
    return Job(
        output=Path(str(section.output)),
        kind="evaluation",
        settings=settings_of(section, config, blend),
        parents={"model": model.path, "reference": reference.path},
        is_record=True,
    )


def run(config: Config, job: Job, groups: "Groups") -> None:
    # torch and Megatron take seconds to import: not before there is something to run.
    from minitron_nemo.checkpoint.formats.nemo import open_nemo
    from minitron_nemo.steps.evaluate import evaluate_model
    from minitron_nemo.steps.options import build_options

    section = config.evaluate
    model, reference = open_nemo(section.checkpoint), open_nemo(section.reference)
    result = evaluate_model(
        model.weights,
        weights_beside(model, reference),
        options=build_options(config, groups),
        blend=blend_for(config, model, weights=section.blend),
        num_samples=section.num_samples,
        micro_batch_size=section.micro_batch_size,
        chunk_tokens=section.chunk_tokens,
    )
    if groups.is_main:
        facts = dict(params=model.arch.num_params(), tokens=model.manifest.tokens, arch=model.arch.to_dict())
        write_record(job.output, {**facts, **dataclasses.asdict(result)}, kind=job.kind, origin=job.origin)
        logger.info(
            f"evaluate: {model.path.name}: cross-entropy {result.cross_entropy:.4f}, perplexity "
            f"{result.perplexity:.2f}, forward KL {result.forward_kl:.4f}, top-1 agreement {result.top1_agreement:.1%}"
        )


RECIPE = RankRecipe("evaluate", prepare, run, check=check, lines=weight_lines)

if __name__ == "__main__":
    main(RECIPE)
