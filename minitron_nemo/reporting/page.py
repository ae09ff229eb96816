"""The report's page: one HTML file that loads nothing, reads in light and dark, and escapes every string."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from minitron_nemo.reporting import plots
from minitron_nemo.reporting.collect import Report
from minitron_nemo.reporting.table import HEADINGS, TRAINING_HEADINGS, in_bytes, sizes, table_row, training_row
from minitron_nemo.reporting.verdict import verdict
from minitron_nemo.shape.arch import ModelArch, billions

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #626b7a; --line: #d9dde4; --paper: #ffffff; --wash: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --soft: #9aa3b2; --line: #363c47; --paper: #15181d; --wash: #1c2027; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 3rem 1.5rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: break-word; }
h2 { font-size: 1.15rem; margin: 3rem 0 0.6rem; padding-top: 0.9rem; border-top: 1px solid var(--line); }
p { max-width: 44rem; margin: 0.5rem 0; overflow-wrap: break-word; }
code { font-size: 0.85rem; color: var(--ink); }
.verdict { font-size: 1.05rem; margin: 1.4rem 0 0; }
.soft, figcaption { color: var(--soft); font-size: 0.9rem; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: separate; border-spacing: 0; min-width: 100%; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0.3rem; white-space: normal; position: sticky; left: 0;
  background: var(--paper); }
tbody tr:hover td { background: var(--wash); }
figure { margin: 1.2rem 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem 1.6rem; }
.panels svg { display: block; width: 100%; height: auto; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; margin: 0.6rem 0; padding: 0;
  font-size: 0.9rem; }
.legend i { display: inline-block; width: 1.2em; height: 0.25em; margin-right: 0.45em; vertical-align: middle; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.2rem; font-size: 0.9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: break-word; min-width: 0; }
@media (max-width: 600px) {
  body { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: 0.5rem; }
  th, td { padding: 0.4rem 0.5rem; }
}
@media print { body { padding: 0; max-width: none; } h2, figure { break-inside: avoid; } }
"""
# The page promises to load nothing; the browser holds it to that.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_page(report: Report) -> str:
    """The whole HTML document."""
    archs = {name: ModelArch.from_dict(model["arch"]) for name, model in report.models.items()}
    sections = [_verdict(report), _results(report), _curves(report), _importance(report), _shapes(report, archs)]
    sections += [_made(report), _facts(report)]
    title = escape(report.title)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}: compression report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{title}</h1>\n<p class="soft">Compression report, {escape(str(report.facts["date"])[:10])}</p>\n'
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _verdict(report: Report) -> str:
    said = verdict(report.models, report.made, reference=report.reference)
    return f'<p class="verdict">{escape(said)}</p>' if said else ""


def _results(report: Report) -> str:
    rows = [table_row(name, model) for name, model in report.models.items()]
    reference = f"the reference, {report.reference}" if report.reference else "the reference of its evaluation"
    note = (
        "Cross-entropy (in nats per token) and perplexity are on held-out text. Forward KL and top-1 agreement compare "
        f"each model's next-token distribution with that of {reference}. Tokens are those each model was trained on."
    )
    caption = (
        "Lower is better for cross-entropy and KL, higher for agreement. The axis of cross-entropy starts near the "
        "lowest value, to show the differences; the others start at 0."
    )
    chart = _figure(plots.results(report.models), caption)
    return _section("Results", _table(HEADINGS, rows), f'<p class="soft">{escape(note)}</p>', chart)


def _curves(report: Report) -> str:
    names = list(report.models)
    svg = plots.loss_curves(report.curves, names)
    rows = [training_row(name, making) for name, making in report.made.items() if making.steps]
    if not svg and not rows:
        return ""
    caption = (
        "Thin: training batches. Marked: validation. Early steps may lie above the frame; KL over tokens is on a log "
        "axis. By place in the sample: at the last validation."
    )
    legend = _legend({name: plots.color_of(name, names) for name in report.curves})
    note = '<p class="soft">Time is that of the steps, without validation and saving.</p>' if rows else ""
    return _section(
        "Training", _table(TRAINING_HEADINGS, rows) if rows else "", note, _figure(svg, caption, legend) if svg else ""
    )


def _importance(report: Report) -> str:
    if report.scores is None:
        return ""
    scores = report.scores
    caption = (
        f"From forward passes over {scores.num_samples} samples of {scores.seq_length} tokens; "
        f"{scores.sequence_aggregation} over the sequence, {scores.batch_aggregation} over the samples."
    )
    return _section("Importance", _figure(plots.importance(scores, report.plans), caption))


def _shapes(report: Report, archs: dict[str, ModelArch]) -> str:
    alike: dict[ModelArch, list[str]] = {}
    for name, arch in archs.items():
        alike.setdefault(arch, []).append(name)
    first = next(iter(alike))
    heads = ("models of this shape", *sizes(first), "parameters", "of the first")
    rows = [
        [", ".join(names), *map(str, sizes(arch).values()), billions(arch.num_params()),
         f"{arch.num_params() / first.num_params():.1%}"]
        for arch, names in alike.items()
    ]  # fmt: skip
    chart = _figure(plots.shapes({names[0]: arch for arch, names in alike.items()}), "One row for each shape.")
    plans = {name: plan.describe() for name, plan in report.plans.items()}
    return _section("Shapes before and after", _table(heads, rows), chart, _definitions(plans))


def _made(report: Report) -> str:
    """When, from which revision and how large; and the commands, each once with the models that it made."""
    rows = [[name, in_bytes(making.size), making.created[:16].replace("T", " "), making.git_revision[:12] or "-"]
            for name, making in report.made.items()]  # fmt: skip
    by_command: dict[str, list[str]] = {}
    for name, making in report.made.items():
        by_command.setdefault(making.command, []).append(name)
    commands = [
        f'<p class="soft">{escape(", ".join(names))}:<br><code>{escape(command or "command not recorded")}</code></p>'
        for command, names in by_command.items()
    ]
    return _section("How it was made", _table(("model", "on disk", "made (UTC)", "git revision"), rows), *commands)


def _facts(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.facts["versions"].items())
    pairs = {"date": report.facts["date"], "machine": report.facts["machine"], "versions": versions}
    return _section("Made with", _definitions(pairs))


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>\n<h2>{escape(title)}</h2>", *filter(None, parts), "</section>"])


def _figure(panels: str, caption: str, legend: str = "") -> str:
    """Panels stand side by side where there is room and under each other where there is not."""
    side_by_side = f'<div class="panels">\n{panels}\n</div>'
    return f"<figure>\n{legend}{side_by_side}\n<figcaption>{escape(caption)}</figcaption>\n</figure>"


def _legend(colors: Mapping[str, str]) -> str:
    entries = "".join(f'<li><i style="background: {color}"></i>{escape(name)}</li>' for name, color in colors.items())
    return f'<ul class="legend">{entries}</ul>\n'


def _definitions(pairs: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in pairs.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
