"""Random weights as a checkpoint: the start of a model made from scratch, and the baseline that pruning must beat."""

from pathlib import Path

from minitron_nemo.checkpoint.formats.hf_families import family_of
from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config, identity
from minitron_nemo.errors import UserError
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.steps.inputs import require
from minitron_nemo.steps.step import Job, Recipe


def arch_of(config: Config) -> ModelArch:
    like = config.random_init.like
    if like is None:
        return config.model_arch()
    require(like)
    from minitron_nemo.checkpoint.formats.nemo import open_nemo  # brings torch, which takes seconds

    return open_nemo(like).arch


def prepare(config: Config) -> Job:
    from minitron_nemo.data.tokenizer import load_tokenizer

    section, arch = config.random_init, arch_of(config)
    family_of(arch)  # before it is trained, not when it is exported
    tokenizer = load_tokenizer(str(section.tokenizer))
    if tokenizer.vocab_size > arch.vocab_size:
        raise UserError(
            f"{section.tokenizer}: the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {arch.vocab_size}"
        )
    settings = dict(arch=arch.to_dict(), seed=config.seed, tokenizer=tokenizer.fingerprint)
    inputs = tuple(Path(str(path)) for path in (section.tokenizer, section.like) if path)
    return Job(Path(str(section.output)), "model", {**identity(section), **settings}, inputs=inputs)


def run(config: Config, job: Job) -> None:
    import torch

    from minitron_nemo.checkpoint.formats.nemo import write_nemo
    from minitron_nemo.checkpoint.random_init import RandomWeights
    from minitron_nemo.checkpoint.source import stream

    section, arch = config.random_init, arch_of(config)
    weights = RandomWeights(arch, seed=config.seed, init_std=section.init_method_std)
    write_nemo(job.output, arch, stream(weights), dtype=torch.float32, tokenizer=section.tokenizer, origin=job.origin)


RECIPE = Recipe("random_init", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
