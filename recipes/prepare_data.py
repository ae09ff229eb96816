"""Prepare data: text files, jsonl and folders become tokens in Megatron's .bin/.idx, with document ends."""

import shutil
from pathlib import Path

from minitron_nemo.checkpoint.manifest import publishing
from minitron_nemo.cli import Job, Recipe, main
from minitron_nemo.config import Config
from minitron_nemo.data.corpora import corpora_settings
from minitron_nemo.data.prepare import prepare_corpus
from minitron_nemo.data.tokenizer import load_tokenizer


def prepare(config: Config) -> Job:
    tokenizer = load_tokenizer(str(config.prepare_data.tokenizer))
    settings = dict(corpora=corpora_settings(config.prepare_data.corpora), tokenizer=tokenizer.fingerprint)
    return Job(Path(str(config.prepare_data.output)), "data", settings)


def run(config: Config, job: Job) -> None:
    section = config.prepare_data
    tokenizer = load_tokenizer(str(section.tokenizer))
    work = job.output.with_name(f"{job.output.name}.shards")  # outlives an interruption
    with publishing(job.output, kind=job.kind, **job.origin) as folder:
        for name, corpus in sorted(section.corpora.items()):
            prepare_corpus(
                name,
                corpus,
                tokenizer=tokenizer,
                output=folder,
                workers=section.workers,
                work=work,
            )
    shutil.rmtree(work, ignore_errors=True)


RECIPE = Recipe("prepare_data", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
