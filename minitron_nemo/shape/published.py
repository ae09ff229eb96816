"""The models that the papers published, by their shape: what a dry run sets beside ours.

Sizes are those of the models' `config.json` and of the papers (2407.14679; 2408.11796; 2402.16819, table 1). Parameters
are the sums that those sizes make, to three digits; the papers print as many or fewer of the same.
"""

from dataclasses import dataclass

from minitron_nemo.shape.arch import ModelArch

SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A published model: parameters in all and without both embedding tables, in billions. Its tables are untied."""

    name: str
    source: str
    sizes: tuple[int, ...]
    parameters: float
    non_embedding_parameters: float

    def describe(self) -> str:
        counts = f"{self.parameters:g} B parameters, {self.non_embedding_parameters:g} B without embeddings"
        return f"{self.name} (arXiv {self.source}): {counts}"


PUBLISHED = (
    Published("Llama-3.1-8B", "2408.11796", (32, 4096, 14336, 32, 8, 128, 128256), 8.03, 6.98),
    Published("Llama-3.1-Minitron-4B-Width", "2408.11796", (32, 3072, 9216, 32, 8, 128, 128256), 4.51, 3.72),
    Published("Llama-3.1-Minitron-4B-Depth", "2408.11796", (16, 4096, 14336, 32, 8, 128, 128256), 4.54, 3.49),
    Published("Mistral-NeMo-12B", "2408.11796", (40, 5120, 14336, 32, 8, 128, 131072), 12.2, 10.9),
    Published("Mistral-NeMo-Minitron-8B", "2408.11796", (40, 4096, 11520, 32, 8, 128, 131072), 8.41, 7.34),
    Published("Nemotron-4-15B", "2402.16819", (32, 6144, 24576, 48, 8, 128, 256000), 15.6, 12.5),
    Published("Minitron-8B", "2407.14679", (32, 4096, 16384, 48, 8, 128, 256000), 8.27, 6.17),
    Published("Minitron-4B", "2407.14679", (32, 3072, 9216, 24, 8, 128, 256000), 4.19, 2.62),
)


def published_as(arch: ModelArch) -> Published | None:
    """The published model of these sizes, None where there is none."""
    sizes = tuple(getattr(arch, name) for name in SIZES)
    untied = not arch.share_embeddings_and_output_weights
    return next((model for model in PUBLISHED if model.sizes == sizes and untied), None)
