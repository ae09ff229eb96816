"""The report's figures, as SVG to stand inside an HTML page and take its text color."""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from io import StringIO
from typing import Any, TypeGuard

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from minitron_nemo.importance.blocks import MEASURES, BlockScores
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.pruning.plan import PruningPlan
from minitron_nemo.reporting.making import Records
from minitron_nemo.reporting.table import sizes
from minitron_nemo.shape.arch import ModelArch, billions
from minitron_nemo.shape.axes import AXES

# Of middle lightness, so that they read on white and on black.
COLORS = ("#4477cc", "#e08030", "#2f9e77", "#b8559f", "#b8942a", "#3f9fb5", "#d1495b", "#8a8f98")
INK = "#010203"  # stands for the page's text color until the SVG is written
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "minitron_nemo",
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": 0.12,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

# Of the panels of importance; an axis without a line here goes by its own name.
TITLES = {
    "hidden_size": "Hidden channels",
    "ffn_hidden_size": "Feed-forward neurons",
    "num_attention_heads": "Attention heads",
}

BLOCK_TITLES = {
    "cosine": "1 - cosine over the block",
    "lm_loss": "Language-model loss without it",
    "nmse": "Error of the final states without it",
    "task": "Accuracy without it",
}

# Inches of a panel. Each is a picture of its own, so that a page can put them side by side or under each other and text
# stays legible: 9 points are 11 pixels on a telephone of 390.
WIDTH, HEIGHT = 4.0, 2.7
MAX_NAME = 24  # letters of a name beside a bar

Series = tuple[list[float], list[float]]


def loss_curves(curves: Mapping[str, Records], names: Sequence[str]) -> str:
    """Training (thin) and validation (marked) losses over the tokens of each run, and the last validation's forward KL
    by the place in the sample; empty without records.
    """
    panels = [
        ("Cross-entropy", "cross_entropy", "val_cross_entropy"),
        ("Forward KL from the teacher", "forward_kl", "val_forward_kl"),
    ]
    drawn = [panel for panel in panels if any(_values(records, *panel[1:]) for records in curves.values())]
    pictures: list[str] = []
    for title, training, validation in drawn:
        with _panel(f"{title} over training tokens", pictures) as axis:
            tops = []
            for name, records in curves.items():
                tops += _draw_run(axis, records, (training, validation), color=color_of(name, names))
            axis.set(title=title, xlabel="training tokens")
            lowest = min(value for records in curves.values() for value in _values(records, training, validation))
            if training == "forward_kl" and lowest > 0:
                _log_scale(axis)
            else:
                axis.set_ylim(top=1.05 * max(tops))
            axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
            axis.xaxis.set_major_locator(MaxNLocator(4))
    if places := {name: found for name, records in curves.items() if (found := _by_place(records))[1]}:
        title = "Forward KL by place in the sample"
        with _panel(title, pictures) as axis:
            for name, (ends, values) in places.items():
                axis.stairs(values, ends, baseline=None, color=color_of(name, names), linewidth=1.6)
            axis.set(title=title, xlabel="token of the sample")
            axis.set_ylim(bottom=0)
    return "\n".join(pictures)


def _by_place(records: Records) -> tuple[list[float], list[float]]:
    """Where the parts of a sample begin and the last ends, and the forward KL in each, of the newest record with it."""
    start = "val_forward_kl/position_"
    for record in reversed(records):
        found = {
            tuple(map(int, name.removeprefix(start).split("-"))): value
            for name, value in record.items()
            if re.fullmatch(f"{start}[0-9]+-[0-9]+", name) and _is_finite(value)
        }
        if found:
            parts = sorted(found)
            return [*(float(first) for first, _ in parts), parts[-1][1] + 1.0], [found[part] for part in parts]
    return [], []


@contextmanager
def _panel(label: str, pictures: list[str], *, height: float = HEIGHT, **style: Any) -> Iterator[Axes]:
    """Axes to draw on; the picture is added to `pictures` when the block ends."""
    rules: dict[Any, Any] = {**STYLE, **style}
    with matplotlib.rc_context(rules):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure.subplots()
        pictures.append(_svg(figure, label))


def _draw_run(axis: Axes, records: Records, keys: tuple[str, str], *, color: str) -> list[float]:
    """Draws both lines; returns values that the panel has to show (early steps may leave it at the top)."""
    training, validation = _points(records, keys[0]), _points(records, keys[1])
    axis.plot(*training, color=color, linewidth=0.8, alpha=0.45)
    axis.plot(*validation, color=color, linewidth=1.6, marker="o", markersize=3)
    shown = validation[1] or training[1]
    return shown[len(shown) // 3 :]


def _values(records: Records, *keys: str) -> list[float]:
    return [value for key in keys for value in _points(records, key)[1]]


def _points(records: Records, key: str) -> Series:
    """Tokens and values of one column, where a record has it."""
    tokens: list[float] = []
    values: list[float] = []
    for record in records:
        consumed, value = record.get("consumed_tokens"), record.get(key)
        if _is_finite(value) and _is_finite(consumed):
            tokens.append(consumed)
            values.append(value)
    return tokens, values


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def importance(scores: ImportanceScores, plans: Mapping[str, PruningPlan]) -> str:
    """The scores of the model, a panel for each axis, with what the plans of this model cut."""
    targets = [plan.target for plan in plans.values() if plan.source == scores.arch]
    dropped = {layer for plan in plans.values() if plan.source == scores.arch for layer in plan.dropped_layers()}
    pictures: list[str] = []
    for name in (name for name in AXES if name in scores.by_axis):
        title = TITLES.get(name, name)
        with _panel(f"Importance: {title}", pictures) as panel:
            if AXES[name].is_layers:
                _draw_layers(panel, scores[name], dropped=dropped, criterion=scores.criteria.get(name))
            elif not AXES[name].per_layer:
                _draw_ranked(panel, scores[name], title=title, kept={AXES[name].size(target) for target in targets})
            elif AXES[name].within is not None:
                _draw_units(panel, scores[name], title=title)
            else:
                _draw_spread(panel, scores[name], title=title)
    return "\n".join(pictures)


def overlap(axis: str, columns: Mapping[str, Sequence[float]]) -> str:
    """A heat map of the shares of kept units in common: a column for each comparison, a row for each layer, or one."""
    title, pictures = TITLES.get(axis, axis), list[str]()
    rows = len(next(iter(columns.values())))
    labels = [name if len(name) <= MAX_NAME else f"...{name[3 - MAX_NAME :]}" for name in columns]
    with _panel(f"Kept in common: {title}", pictures, height=2.7 + 0.1 * rows) as panel:
        few_colors = matplotlib.colormaps["viridis"].resampled(32)  # as in `_draw_units`
        shares = torch.tensor(list(columns.values()), dtype=torch.float64).T
        edges = [(torch.arange(size + 1) + 0.5).numpy() for size in reversed(shares.shape)]
        mesh = panel.pcolormesh(*edges, shares.numpy(), cmap=few_colors, vmin=0.0, vmax=1.0)
        panel.set(title=f"{title}: share of kept units in common", ylabel="layer" if rows > 1 else "")
        panel.set_xticks(range(1, len(columns) + 1), labels, rotation=30, ha="right", fontsize=7)
        panel.grid(visible=False)
        panel.invert_yaxis()
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
        panel.figure.colorbar(mesh, ax=panel).outline.set_visible(False)
    return pictures[0]


def standing_alone(svg: str) -> str:
    """A picture as a file of its own, on white."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg ", f'<svg {names} style="color: #222; background: #fff" ', 1) + "\n"


def _draw_layers(panel: Axes, scores: Tensor, *, dropped: Collection[int], criterion: str | None) -> None:
    """Every layer a bar, counted from 1."""
    numbers = range(1, len(scores) + 1)
    colors = [COLORS[6] if number in dropped else COLORS[0] for number in numbers]
    panel.bar(numbers, scores.tolist(), color=colors, width=0.75)
    title, unit = ("Block importance", "1 - cosine") if criterion is None else ("Layers", criterion)
    panel.set(title=title + (" (red: dropped)" if dropped else ""), xlabel="layer", ylabel=unit)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_units(panel: Axes, scores: Tensor, *, title: str) -> None:
    """Every unit of every layer a patch, for axes of few units; `scores` is [layers, units]."""
    relative = scores / scores.mean(dim=1, keepdim=True).clamp_min(1e-30)
    columns, rows = (torch.arange(size + 1) + 0.5 for size in reversed(scores.shape))
    few_colors = matplotlib.colormaps["viridis"].resampled(32)  # with more, the color bar becomes a bitmap
    mesh = panel.pcolormesh(columns.numpy(), rows.numpy(), relative.numpy(), cmap=few_colors)
    panel.set(title=f"{title} (1: mean of the layer)", xlabel="unit", ylabel="layer")
    panel.grid(visible=False)
    panel.invert_yaxis()
    for side in (panel.xaxis, panel.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    panel.figure.colorbar(mesh, ax=panel).outline.set_visible(False)


def _draw_spread(panel: Axes, scores: Tensor, *, title: str) -> None:
    """Quantiles over the units of every layer, for axes of many units; `scores` is [layers, units]."""
    numbers = list(range(1, len(scores) + 1))
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    low, lower, median, upper, high = torch.quantile(scores.double(), quantiles, dim=1).tolist()
    panel.fill_between(numbers, low, high, color=COLORS[2], alpha=0.2, linewidth=0, label="5 to 95 % of units")
    panel.fill_between(numbers, lower, upper, color=COLORS[2], alpha=0.35, linewidth=0, label="25 to 75 %")
    panel.plot(numbers, median, color=COLORS[2], marker="o", markersize=3, label="median")
    if min(low) > 0:
        _log_scale(panel)
    panel.set(title=title, xlabel="layer", ylabel="score")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.legend(fontsize=8)


def _draw_ranked(panel: Axes, scores: Tensor, *, title: str, kept: Collection[int]) -> None:
    """The units of the whole model from the best down, with the sizes that plans keep."""
    ranked = scores.sort(descending=True).values.tolist()
    panel.plot(range(1, len(ranked) + 1), ranked, color=COLORS[3])
    for size in sorted(set(kept) - {len(ranked)}):
        panel.axvline(size, color=COLORS[6], linewidth=1)
        panel.annotate(f"{size} kept", (size, ranked[0]), xytext=(-4, 0), textcoords="offset points", fontsize=8,
                       color=COLORS[6], ha="right", va="top")  # fmt: skip
    if ranked[-1] > 0:
        _log_scale(panel)
    panel.set(title=f"{title}, ranked", xlabel="rank", ylabel="score")


def block_scores(scores: BlockScores) -> str:
    """Scores of blocks by their first layer as an SVG file: a row for each length, a column for each measure.

    The best block is marked; a broken line is the whole model.
    """
    measures = [measure for measure in MEASURES if measure in scores.values]
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white"}):
        size = (WIDTH * len(measures), HEIGHT * len(scores.lengths))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(scores.lengths), len(measures), squeeze=False)
        for row, length in zip(panels, scores.lengths, strict=True):
            for panel, measure in zip(row, measures, strict=True):
                _draw_blocks(panel, scores, measure, length=length)
        return _svg(figure, "Scores of blocks of layers", alone=True)


def _draw_blocks(panel: Axes, scores: BlockScores, measure: str, *, length: int) -> None:
    values, best = scores.of(measure, length), scores.best_block(measure, length)[0]
    panel.plot(range(1, len(values) + 1), values, color=COLORS[0], marker="o", markersize=3)
    panel.plot([best], [values[best - 1]], color=COLORS[6], marker="o", markersize=6)
    if measure in scores.whole:
        panel.axhline(scores.whole[measure], color=COLORS[7], linewidth=1, linestyle="--")
    what = "layer" if length == 1 else f"first of {length} layers"
    panel.set(title=BLOCK_TITLES[measure], xlabel=f"{what} left out (best: {best})")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _log_scale(axis: Axes) -> None:
    """Plain tick labels: the powers that matplotlib writes by itself are mathematics, which names must not become."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def shapes(archs: Mapping[str, ModelArch]) -> str:
    """The sizes of each distinct shape, a panel per axis."""
    rows = {name: {**sizes(arch), "parameters": arch.num_params()} for name, arch in archs.items()}
    columns: dict[str, tuple[str, Any]] = {
        title: (title, billions if title == "parameters" else str) for title in next(iter(rows.values()))
    }
    return _bars(rows, columns)


def results(models: Mapping[str, dict[str, Any]]) -> str:
    """Cross-entropy, divergence from the reference and agreement of every model; only the first not from zero."""
    columns: dict[str, tuple[str, Any]] = {
        "cross_entropy": ("cross-entropy", lambda value: f"{value:.3f}"),
        "forward_kl": ("forward KL", lambda value: f"{value:.3f}"),
        "top1_agreement": ("top-1 agreement", lambda value: f"{value:.1%}"),
    }
    return _bars(models, columns, near=("cross_entropy",))


def _bars(
    rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, tuple[str, Any]], *, near: Collection[str] = ()
) -> str:
    """A panel of bars for each column, a bar for each row; the axes of the columns `near` start near their minimum."""
    names, pictures = list(rows), list[str]()
    for key, (title, form) in columns.items():
        with _panel(title, pictures, height=0.7 + 0.26 * len(names), **{"axes.grid": False}) as axis:
            values = [rows[name][key] for name in names]
            start = _near_minimum([value for value in values if _is_finite(value)]) if key in near else 0.0
            _draw_bars(
                axis, names, values, title=title if not start else f"{title}, from {start:g}", form=form, start=start
            )
            axis.invert_yaxis()  # the first name on top
    return "\n".join(pictures)


def _near_minimum(values: Sequence[float]) -> float:
    """A round number a little below the least of these: differences show, the least keeps a bar. 0 for one value."""
    if len(set(values)) < 2 or min(values) <= 0:
        return 0.0
    span = max(values) - min(values)
    step = 10.0 ** math.floor(math.log10(span))
    return max(0.0, round(math.floor((min(values) - 0.1 * span) / step * 10) * step / 10, 6))


def _draw_bars(axis: Axes, names: Sequence[str], values: Sequence[Any], *, title: str, form: Any, start: float) -> None:
    finite = [value - start if _is_finite(value) else 0.0 for value in values]
    places = range(len(names))
    bars = axis.barh(places, finite, left=start, color=[color_of(name, names) for name in names], height=0.7)
    labels = [form(value) if _is_finite(value) else "-" for value in values]
    axis.bar_label(bars, labels=labels, padding=3, fontsize=8)
    axis.set_yticks(places, [name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 3]}..." for name in names])
    axis.set_title(title)
    axis.set_xlim(start, start + 1.35 * (max(finite) or 1.0))
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(left=False)


def color_of(name: str, names: Sequence[str]) -> str:
    """The color of a model among these, the same in every picture."""
    return COLORS[list(names).index(name) % len(COLORS)]


def _svg(figure: Figure, label: str, *, alone: bool = False) -> str:
    """The figure without the parts that only a file of its own needs, unless it is `alone` in one; inside a page, text
    takes the color of the page.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    if alone:
        return text
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1).replace(INK, "currentColor")
