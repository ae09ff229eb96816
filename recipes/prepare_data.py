"""Prepare data: text files, jsonl and folders become tokens in Megatron's .bin/.idx, with document ends."""

import shutil
from pathlib import Path

from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config, identity
from minitron_nemo.data.corpora import corpora_paths, corpora_settings
from minitron_nemo.steps.describe import shapes
from minitron_nemo.steps.forecast import corpora_lines
from minitron_nemo.steps.step import Job, Recipe


def prepare(config: Config) -> Job:
    from minitron_nemo.data.tokenizer import load_tokenizer

    section = config.prepare_data
    corpora = corpora_settings(section.corpora)
    tokenizer = load_tokenizer(str(section.tokenizer))
    settings = {
        **identity(section),
        "corpora": corpora,
        "tokenizer": tokenizer.fingerprint,
        "bos": tokenizer.bos(section.add_bos),
    }
    inputs = (*corpora_paths(section.corpora), Path(str(section.tokenizer)))
    return Job(Path(str(section.output)), "data", settings, inputs=inputs)


def run(config: Config, job: Job) -> None:
    from minitron_nemo.data.prepare import prepare_corpus
    from minitron_nemo.data.tokenizer import load_tokenizer

    section = config.prepare_data
    tokenizer = load_tokenizer(str(section.tokenizer))
    work = job.output.with_name(f"{job.output.name}.shards")  # outlives an interruption
    with publishing(job.output, kind=job.kind, origin=job.origin) as draft:
        for name, corpus in sorted(section.corpora.items()):
            prepare_corpus(
                name,
                corpus,
                tokenizer=tokenizer,
                output=draft.folder,
                add_bos=section.add_bos,
                workers=section.workers,
                work=work,
            )
    shutil.rmtree(work, ignore_errors=True)


RECIPE = Recipe(
    "prepare_data", prepare, run, lines=lambda config: corpora_lines(config, shapes(config).teacher.vocab_size)
)

if __name__ == "__main__":
    main(RECIPE)
