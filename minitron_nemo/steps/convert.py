"""A checkpoint of any format in another one, or in the files of another layout."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from minitron_nemo.artefacts.contents import contents_of, has
from minitron_nemo.artefacts.lineage import ancestors
from minitron_nemo.artefacts.manifest import MANIFEST_FILE, file_sha256, manifest_sha256
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.formats.known import FORMATS, Format, open_checkpoint, written_format
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.progress import watched

SMALL = 16 * 2**20  # bytes; what is larger is known by size and time: hashing it to skip a copy would be no gain
HF_CONFIG = "hf_config.json"


def check_layout(format: Format, layout: Layout) -> None:
    """Refuse a layout for a format whose files follow none."""
    if layout.model_ranks > 1 and not format.splits:
        splitting = ", ".join(row.name for row in FORMATS.values() if row.splits)
        raise UserError(
            f"convert.format={format.name}: its files follow no layout; leave the parallel sizes at 1, or give one of "
            f"{splitting}"
        )


def facts_of_source(source: Path) -> dict[str, object]:
    """What tells the content of a foreign checkpoint again: hashes of its small files, size and time of the others."""
    contents = contents_of(source)
    facts: dict[str, object] = {}
    for name in contents.names():
        found = contents.find(name)
        if found is not None:
            large = [found.length, found.path.stat().st_mtime_ns]
            facts[name] = large if found.length > SMALL else file_sha256(found)
    return facts


def is_ours(source: Path) -> bool:
    """Whether a manifest says what the checkpoint is."""
    return has(contents_of(source), MANIFEST_FILE)


def convert(
    source: str | Path | Checkpoint,
    output: str | Path,
    *,
    format: str,
    layout: Layout | None = None,
    origin: Origin | None = None,
    page: Mapping[str, bytes] | None = None,
) -> None:
    """Publish a checkpoint as `output`, a tensor at a time; no tensor changes.

    `format` is a name in docs/formats.md, `layout` whose files its weights are split into. `page` are files for the hub
    beside them, where the format has a place for such. `origin` is by default made of the source and the target.
    Raises UserError for a source that is not sound, before anything of it is published.
    """
    target, layout = written_format(format), layout or Layout()
    check_layout(target, layout)
    assert target.write is not None
    model = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    place = model.path if isinstance(source, Checkpoint) else Path(source)
    origin = origin or _origin_of(place, format, layout)
    model = dataclasses.replace(with_token_ids(model), page=page or {})
    tensors = watched(stream(model.weights), len(model.weights.names()), f"to {format}", unit="tensor")
    target.write(Path(output), model, tensors, origin=origin, layout=layout)


def _origin_of(source: Path, format: str, layout: Layout) -> Origin:
    settings = {"format": format, "tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp}
    kind = FORMATS[format].kind
    if not is_ours(source):
        return Origin.of(kind, {**settings, "files": facts_of_source(source)})
    parents, lineage = {"model": manifest_sha256(source)}, ancestors({"model": source})
    return Origin.of(kind, settings, parents=parents, lineage=lineage)


def with_token_ids(model: Checkpoint) -> Checkpoint:
    """The checkpoint with the ids that begin and end a text, where no Hugging Face config came along to say them."""
    files = model.tokenizer
    if files is None or has(files, HF_CONFIG) or model.files or not has(files, "tokenizer.json"):
        return model
    return dataclasses.replace(model, token_ids=load_tokenizer(files).special_ids())
