"""Which text a training sample is: its corpus, and the numbers of its documents there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SampleId:
    """`number` counts the samples of a run, `documents` those of the corpus as its `.idx` has them; both from 0.

    A sample begins inside of its first document and ends inside of its last.
    """

    number: int
    source: str
    documents: tuple[int, ...]

    def __str__(self) -> str:
        """`sample 57 of code (documents 12, 13)`"""
        documents = ", ".join(map(str, self.documents[:3])) + (", ..." if len(self.documents) > 3 else "")
        return f"sample {self.number} of {self.source} (document{'s'[: len(self.documents) > 1]} {documents})"


def sample_ids(dataset: Any, numbers: Sequence[int], *, sources: Sequence[str]) -> list[SampleId]:
    """What these samples of a dataset of `build_datasets` are; `sources` as `Blend.sources` has them."""
    return [_sample_id(dataset, number, sources) for number in numbers]


def _sample_id(dataset: Any, number: int, sources: Sequence[str]) -> SampleId:
    source, inside, corpus = 0, number, dataset
    if hasattr(dataset, "dataset_index"):  # a blend
        source, inside = int(dataset.dataset_index[number]), int(dataset.dataset_sample_index[number])
        corpus = dataset.datasets[source]
    _, documents = corpus._query_document_sample_shuffle_indices(inside)
    return SampleId(number, sources[source], tuple(int(document) for document in documents))
