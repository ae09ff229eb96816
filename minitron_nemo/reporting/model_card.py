"""What a page on the hub needs beside a model: a card filled from its lineage, and the notice its licence asks for.

Whatever a manifest, a folder's name or another card says is data here: the header is dumped as YAML, text is escaped.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minitron_nemo.artefacts.contents import Contents, contents_of, has, read_small
from minitron_nemo.artefacts.lineage import ancestors
from minitron_nemo.artefacts.manifest import MANIFEST_FILE, Manifest, manifest_sha256, read_manifest
from minitron_nemo.artefacts.records import read_record
from minitron_nemo.artefacts.upstream import CARD, LICENCE_FILES, LICENCE_LIMIT, Upstream, read_upstream, upstream_of
from minitron_nemo.errors import UserError
from minitron_nemo.pruning.plan import PruningPlan, plan_of_model
from minitron_nemo.reporting.licences import LICENCES, Licence, licence_of
from minitron_nemo.reporting.making import folders_by_hash
from minitron_nemo.reporting.table import sizes
from minitron_nemo.shape.arch import ModelArch, billions

NOTICE_FILE = "NOTICE"
LONGEST = 300  # characters of a foreign text that are shown
SCORES = {
    "cross_entropy": ("cross-entropy", ".4f"),
    "perplexity": ("perplexity", ".2f"),
    "forward_kl": ("forward KL from the reference", ".4f"),
    "top1_agreement": ("top-1 agreement with the reference", ".1%"),
}


@dataclass(frozen=True)
class Wishes:
    """What a user says about the page; None: what the model itself says."""

    name: str | None = None
    base_model: str | None = None
    licence: str | None = None
    evaluation: Path | None = None


@dataclass(frozen=True)
class HubPage:
    """Files by name to lay beside the weights, and what whoever publishes them should know, a line each."""

    files: dict[str, bytes]
    notes: list[str]


@dataclass(frozen=True)
class Ancestor:
    """A model on the way to this one; what its folder says, where that lies beside this model's."""

    name: str
    role: str
    manifest: Manifest | None = None
    plan: PruningPlan | None = None
    arch: ModelArch | None = None


def page_of_checkpoint(path: Path, arch: ModelArch, tokenizer: Contents | None, *, called: str) -> HubPage:
    """The page of a checkpoint of any format, which only a model artefact knows the making of."""
    contents = contents_of(path)
    if has(contents, MANIFEST_FILE) and read_manifest(contents, kind=None).kind == "model":
        return hub_page(path, tokenizer, called=called, wishes=Wishes())
    known = upstream_of(path, given=str(path))
    return hub_page(path, tokenizer, called=called, wishes=Wishes(None, known.name, known.licence), foreign=arch)


def hub_page(
    path: Path, tokenizer: Contents | None, *, called: str, wishes: Wishes, foreign: ModelArch | None = None
) -> HubPage:
    """The page of the model artefact at `path`, whose licence files lie in `tokenizer`; `called` is its name if none
    is wished for. `foreign` is the shape of a checkpoint that somebody else made, of which nothing more is known.
    UserError for an evaluation that is wished for and is another model's.
    """
    manifest = read_manifest(path, kind="model") if foreign is None else None
    known = Upstream() if tokenizer is None else read_upstream(tokenizer)
    upstream = Upstream(wishes.base_model or known.name, wishes.licence or known.licence)
    identifier = licence_of(upstream)
    licence = LICENCES.get(identifier or "")
    name, notes = wishes.name or called, []
    if licence is not None and licence.prefix and not name.replace(" ", "-").startswith(licence.prefix):
        if wishes.name is not None:
            notes.append(f"export_hf.model_name={name}: the licence asks for one that begins with {licence.prefix}")
        else:
            name = f"{licence.prefix}-{name}"
    files = _notice(tokenizer, licence)
    kept = [file for file in LICENCE_FILES if tokenizer is not None and has(tokenizer, file)]
    if identifier is None:
        notes.append("the licence of the model that it comes from is not known: the card needs it (export_hf.license)")
    elif not any(file.startswith("LICENSE") for file in kept):
        notes.append("no LICENSE came with the source; put a copy of the licence beside the model before you share it")
    line = [Ancestor(called, "", arch=foreign)] if manifest is None else _line(path)
    evaluation = None if manifest is None else _evaluation(path, wishes.evaluation)
    parts = [
        _header(upstream, identifier, line),
        f"# {_text(name)}",
        *([licence.shown] if licence and licence.shown else []),
        _summary(manifest, upstream, line),
        _shapes(line),
        _made(line) if manifest is not None else "",
        _scores(evaluation),
        _licence(identifier, licence, sorted({*kept, *files})),
        USE,
        _origin(manifest, path) if manifest is not None else FOREIGN,
    ]
    files[CARD] = ("\n\n".join(part for part in parts if part) + "\n").encode()
    return HubPage(files, notes)


USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
```"""


FOREIGN = "Converted by minitron_nemo from a checkpoint of another format, bit for bit."


def _text(value: Any) -> str:
    """A foreign text as Markdown that shows it, on one line: nothing in it is markup, HTML or a cell of a table."""
    line = " ".join(str(value).split())
    line = "".join(char for char in line if char.isprintable())
    line = line if len(line) <= LONGEST else line[: LONGEST - 3] + "..."
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$:@])", r"\\\1", line)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _line(path: Path) -> list[Ancestor]:
    """The models on the way to this one, the first first, this one last."""
    folders = folders_by_hash(path.parent)
    entries = [entry for entry in ancestors({"": path}) if entry["kind"] == "model"]
    found = []
    for entry in sorted(entries, key=lambda entry: -entry["generation"]):
        place = path if entry["generation"] == 1 else folders.get(entry["sha256"])
        manifest = None if place is None else read_manifest(place, kind="model")
        plan = None if place is None else plan_of_model(place)
        name = entry["name"].removesuffix(".nemo")
        found.append(Ancestor(name, entry["role"], manifest, plan, _shape_of(manifest, name)))
    return found


def _shape_of(manifest: Manifest | None, name: str) -> ModelArch | None:
    values = {} if manifest is None else manifest.extra.get("arch", {})
    return ModelArch.from_dict(values, source=f"{name}: arch") if values else None


def _header(upstream: Upstream, identifier: str | None, line: Sequence[Ancestor]) -> str:
    """The YAML between two lines of dashes that the hub reads."""
    tags = ["minitron", *(["pruning"] if _is_pruned(line) else []), *(["distillation"] if _teachers(line) else [])]
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if upstream.name is not None:
        values["base_model"] = upstream.name
    if identifier is not None:
        known = LICENCES.get(identifier)
        if known is not None and not known.is_other:
            values["license"] = identifier
        else:
            values |= {"license": "other", "license_name": identifier} | ({"license_link": known.link} if known else {})
    return f"---\n{yaml.safe_dump(values, sort_keys=False, width=1000)}---"


def _is_pruned(line: Sequence[Ancestor]) -> bool:
    return any(ancestor.plan is not None for ancestor in line)


def _teachers(line: Sequence[Ancestor]) -> list[Ancestor]:
    return [ancestor for ancestor in line if ancestor.role.startswith("teacher")]


def _summary(manifest: Manifest | None, upstream: Upstream, line: Sequence[Ancestor]) -> str:
    arch = line[-1].arch
    size = f"A language model of {billions(arch.num_params())} parameters" if arch else "A language model"
    base = f", made from {_text(upstream.name)}" if upstream.name else ""
    how = [word for word, is_so in (("pruned", _is_pruned(line)), ("distilled", bool(_teachers(line)))) if is_so]
    words = f" by the Minitron recipe (arXiv 2407.14679, 2408.11796): {' and '.join(how)}" if how else ""
    trained = 0 if manifest is None else manifest.tokens
    tokens = f", on {billions(trained)} tokens in its last training" if trained else ""
    return f"{size}{base}{words}{tokens}."


def _shapes(line: Sequence[Ancestor]) -> str:
    first = next((ancestor.plan.source for ancestor in line if ancestor.plan is not None), None)
    after = line[-1].arch
    if after is None:
        return ""
    if first is None or first == after:
        rows = [[name, str(size)] for name, size in sizes(after).items()]
        return "## Shape\n\n" + _table(["", "this model"], rows)
    rows = [[name, str(size), str(sizes(after)[name])] for name, size in sizes(first).items()]
    rows.append(["parameters", billions(first.num_params()), billions(after.num_params())])
    return "## Shape\n\n" + _table(["", "source", "this model"], rows)


def _made(line: Sequence[Ancestor]) -> str:
    """A row for each model on the way; what is not beside this one is known by name alone."""
    rows = []
    for ancestor in line:
        manifest, arch = ancestor.manifest, ancestor.arch
        rows.append([
            _text(ancestor.name) or "?",
            _text(ancestor.role) or "this model",
            billions(arch.num_params()) if arch else "?",
            billions(manifest.tokens) if manifest else "?",
            _text(ancestor.plan.describe()) if ancestor.plan else "",
        ])  # fmt: skip
    headings = ["model", "taken as", "parameters", "tokens of its training", "what was pruned"]
    return "## How it was made\n\nThe first model first.\n\n" + _table(headings, rows)


def _evaluation(path: Path, wished: Path | None) -> dict[str, Any] | None:
    """The record of this very model's evaluation: the one wished for, else the run's where it is of this model."""
    place = wished or path.parent / "eval" / f"{path.name.removesuffix('.nemo')}.json"
    if wished is None and not place.is_file():
        return None
    try:
        record = read_record(place, kind="evaluation")
    except UserError:
        if wished is not None:
            raise
        return None  # nobody asked for it
    parents = record.get("parents")
    if isinstance(parents, dict) and parents.get("model") == manifest_sha256(path):
        return record
    if wished is not None:
        raise UserError(f"{wished}: evaluates another model than {path} now is; run evaluate on it, or give its record")
    return None


def _scores(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    rows = [
        [title, format(value, form)]
        for name, (title, form) in SCORES.items()
        if isinstance(value := record.get(name), int | float) and not isinstance(value, bool)
    ]
    tokens = record.get("num_tokens")
    on = f" of {billions(tokens)} tokens" if isinstance(tokens, int) else ""
    return f"## Scores\n\nOn held-out text of its own data{on}.\n\n" + _table(["measure", "value"], rows)


def _licence(identifier: str | None, licence: Licence | None, files: Sequence[str]) -> str:
    if identifier is None:
        return "## Licence\n\nNot known: that of the model that it comes from holds for it too."
    title = f"[{licence.title}]({licence.link})" if licence else _text(identifier)
    parts = [f"## Licence\n\nThat of the model that it comes from: {title}."]
    if licence and licence.limits:
        parts.append(licence.limits)
    if licence and licence.notice:
        parts.append(licence.notice)
    if present := [file for file in files if file in LICENCE_FILES]:
        parts.append(f"Files beside this one: {', '.join(map(_text, present))}.")
    return "\n\n".join(parts)


def _notice(tokenizer: Contents | None, licence: Licence | None) -> dict[str, bytes]:
    """The NOTICE that a licence asks for, behind what the source's own says; nothing where that has the sentence."""
    if licence is None or licence.notice is None:
        return {}
    kept = {
        name: read_small(tokenizer, name, limit=LICENCE_LIMIT)
        for name in LICENCE_FILES
        if tokenizer is not None and name.lower().startswith("notice") and has(tokenizer, name)
    }
    sentence = licence.notice.encode()
    if any(sentence in content for content in kept.values()):
        return {}
    before = kept.get(NOTICE_FILE, b"").rstrip()
    return {NOTICE_FILE: (before + b"\n\n" if before else b"") + sentence + b"\n"}


def _origin(manifest: Manifest, path: Path) -> str:
    revision = f" at {_text(manifest.git_revision[:12])}" if manifest.git_revision else ""
    version = _text(manifest.versions.get("minitron_nemo", "?"))
    return (
        f"Made by minitron_nemo {version}{revision} on {_text(manifest.created)} from a model whose manifest has the "
        f"SHA-256 {manifest_sha256(contents_of(path))}."
    )
