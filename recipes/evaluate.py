"""Evaluate: loss and perplexity on held-out text, and closeness to the reference model (the corrected teacher)."""

import dataclasses
from pathlib import Path

from minitron_nemo.checkpoint.nemo import open_nemo
from minitron_nemo.checkpoint.record import write_record
from minitron_nemo.cli import Job, Recipe, logger, main, open_verified
from minitron_nemo.config import Config
from minitron_nemo.data.blend import build_datasets
from minitron_nemo.distillation.head import HeadLoss
from minitron_nemo.distillation.teacher import Teacher
from minitron_nemo.engine.model import build_model
from minitron_nemo.engine.weights import load_weights
from minitron_nemo.evaluation.perplexity import evaluate
from minitron_nemo.objectives import DistillationObjective
from minitron_nemo.parallel import Groups
from minitron_nemo.runs import (
    batches_on,
    check_data,
    check_model,
    check_samples,
    data_arguments,
    engine_of,
    require_same_tokenizer,
)


def prepare(config: Config) -> Job:
    section = config.evaluate
    model, reference = open_verified(section.checkpoint), open_verified(section.reference)
    require_same_tokenizer(model, reference)
    check_model(config, "model", model)
    check_model(config, "reference", reference)
    check_samples(config, "evaluate", num_samples=section.num_samples, micro_batch_size=section.micro_batch_size)
    settings = dict(num_samples=section.num_samples, data=check_data(config, section.blend, model))
    parents = {"model": model.path, "reference": reference.path}
    return Job(Path(str(section.output)), "evaluation", settings, parents, is_record=True)


def run(config: Config, job: Job, groups: Groups) -> None:
    section = config.evaluate
    source, reference = open_nemo(section.checkpoint), open_nemo(section.reference)
    engine = engine_of(config, groups)
    model = build_model(source.arch, engine)
    load_weights(model, source, groups)
    head = HeadLoss(vocab_size=source.arch.vocab_size, chunk_tokens=section.chunk_tokens, group=groups.tp)
    teacher = Teacher(reference, engine)
    _, held_out = build_datasets(
        config.data, num_train=0, num_valid=section.num_samples, **data_arguments(config, section.blend, source)
    )
    result = evaluate(
        model.eval(),
        DistillationObjective(head, teacher),
        batch=batches_on(groups.device, held_out),
        num_samples=section.num_samples,
        micro_batch_size=section.micro_batch_size,
        groups=groups,
    )
    if groups.is_main:
        facts = dict(params=source.arch.num_params(), tokens=source.manifest.tokens, arch=source.arch.to_dict())
        write_record(job.output, {**facts, **dataclasses.asdict(result)}, kind=job.kind, **job.origin)
        logger.info(
            f"evaluate: {source.path.name}: loss {result.validation_loss:.4f}, perplexity {result.perplexity:.2f}, "
            f"forward KL {result.forward_kl:.4f}, top-1 agreement {result.top1_agreement:.1%}"
        )


RECIPE = Recipe("evaluate", prepare, run, on_ranks=True)

if __name__ == "__main__":
    main(RECIPE)
