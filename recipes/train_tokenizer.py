"""Train a byte-level BPE tokenizer on the corpora, for a model made from scratch."""

from itertools import chain
from pathlib import Path

from minitron_nemo.artefacts.publishing import publishing
from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config, identity
from minitron_nemo.data.corpora import corpora_paths, corpora_settings, read_documents
from minitron_nemo.steps.step import Job, Recipe


def prepare(config: Config) -> Job:
    section = config.train_tokenizer
    settings = {**identity(section), "corpora": corpora_settings(config.prepare_data.corpora)}
    inputs = corpora_paths(config.prepare_data.corpora)
    return Job(Path(str(section.output)), "tokenizer", settings, inputs=inputs)


def run(config: Config, job: Job) -> None:
    from minitron_nemo.data.tokenizer import train_tokenizer

    texts = chain.from_iterable(
        read_documents(corpus, name=name) for name, corpus in sorted(config.prepare_data.corpora.items())
    )
    with publishing(job.output, kind=job.kind, origin=job.origin) as draft:
        train_tokenizer(texts, vocab_size=config.train_tokenizer.vocab_size, output=draft.folder)


RECIPE = Recipe("train_tokenizer", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
