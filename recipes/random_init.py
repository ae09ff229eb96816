"""Random weights as a checkpoint: the start of a model made from scratch, and the baseline that pruning must beat."""

from pathlib import Path

import torch

from minitron_nemo.checkpoint.nemo import open_nemo, write_nemo
from minitron_nemo.checkpoint.random_init import random_tensor
from minitron_nemo.cli import Job, Recipe, main
from minitron_nemo.config import Config
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.errors import UserError


def prepare(config: Config) -> Job:
    section = config.random_init
    arch = open_nemo(section.like).arch if section.like else config.model.arch()
    tokenizer = load_tokenizer(str(section.tokenizer))
    if tokenizer.vocab_size > arch.vocab_size:
        raise UserError(
            f"{section.tokenizer}: the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size is {arch.vocab_size}"
        )
    settings = dict(
        arch=arch.to_dict(), seed=config.seed, init_method_std=section.init_method_std, tokenizer=tokenizer.fingerprint
    )
    return Job(Path(str(section.output)), "model", settings)


def run(config: Config, job: Job) -> None:
    section = config.random_init
    arch = open_nemo(section.like).arch if section.like else config.model.arch()
    write_nemo(
        job.output,
        arch,
        tensors=lambda parameter, layer: random_tensor(
            parameter, layer, arch=arch, seed=config.seed, init_std=section.init_method_std
        ),
        tokenizer=section.tokenizer,
        dtype=torch.float32,
        **job.origin,
    )


RECIPE = Recipe("random_init", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
