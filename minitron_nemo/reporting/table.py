"""The results of a run as rows of text: the cells that the page and the terminal share."""

import math
from collections.abc import Mapping

from minitron_nemo.progress import duration
from minitron_nemo.reporting.collect import Model
from minitron_nemo.reporting.making import Making
from minitron_nemo.shape.arch import ModelArch, billions
from minitron_nemo.shape.axes import AXES

HEADINGS = ("model", "parameters", "tokens", "cross-entropy", "perplexity", "forward KL", "top-1 agreement")
SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "feed-forward",
    "num_attention_heads": "query heads",
    "num_query_groups": "query groups",
    "vocab_size": "vocabulary",
}  # an axis without a line here goes by its own name


def table_row(name: str, model: Model) -> list[str]:
    """The cells of one model under `HEADINGS`."""
    return [
        name,
        billions(model["params"]),
        billions(model["tokens"]),
        _cell(model["cross_entropy"], ".4f"),
        _cell(model["perplexity"], ".2f"),
        _cell(model["forward_kl"], ".4f"),
        _cell(model["top1_agreement"], ".1%"),
    ]


TRAINING_HEADINGS = ("model", "steps", "tokens", "time", "tokens/s", "of peak FLOP/s")


def training_row(name: str, making: Making) -> list[str]:
    """The cells of a model's training under `TRAINING_HEADINGS`."""
    return [
        name,
        str(making.steps),
        billions(making.tokens),
        duration(making.seconds),
        billions(making.tokens_per_second),
        _cell(making.utilization, ".0%"),
    ]


def in_bytes(size: float) -> str:
    """`63.1 GB`: powers of ten."""
    return billions(size).replace(" B", " G").replace(" K", " k") + "B" if size >= 1000 else f"{size:g} bytes"


def sizes(arch: ModelArch) -> dict[str, int]:
    """The size of every prunable axis, by the name it is shown under."""
    return {SIZES.get(name, name): axis.size(arch) for name, axis in AXES.items()}


def format_table(models: Mapping[str, Model]) -> str:
    """The results as an aligned text table, one line per model, for a terminal."""
    rows = [HEADINGS, *(tuple(table_row(name, model)) for name, model in models.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    lines = [form.format(*row) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if math.isfinite(value) else "diverged"
