"""Train a byte-level BPE tokenizer on the corpora, for a model made from scratch."""

from itertools import chain
from pathlib import Path

from minitron_nemo.checkpoint.manifest import publishing
from minitron_nemo.cli import Job, Recipe, main
from minitron_nemo.config import Config
from minitron_nemo.data.corpora import corpora_settings, read_documents
from minitron_nemo.data.tokenizer import train_tokenizer


def prepare(config: Config) -> Job:
    settings = dict(vocab_size=config.train_tokenizer.vocab_size, corpora=corpora_settings(config.prepare_data.corpora))
    return Job(Path(str(config.train_tokenizer.output)), "tokenizer", settings)


def run(config: Config, job: Job) -> None:
    texts = chain.from_iterable(
        read_documents(corpus, name=name) for name, corpus in sorted(config.prepare_data.corpora.items())
    )
    with publishing(job.output, kind=job.kind, **job.origin) as folder:
        train_tokenizer(texts, vocab_size=config.train_tokenizer.vocab_size, output=folder)


RECIPE = Recipe("train_tokenizer", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
