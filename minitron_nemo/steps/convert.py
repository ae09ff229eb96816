"""A checkpoint of any format in another one, or in the files of another layout."""

import dataclasses
from pathlib import Path

from minitron_nemo.artefacts.contents import contents_of, has
from minitron_nemo.artefacts.manifest import MANIFEST_FILE, file_sha256
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.formats.known import FORMATS, Format, open_checkpoint
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError
from minitron_nemo.progress import watched

SMALL = 16 * 2**20  # bytes; what is larger is known by size and time: hashing it to skip a copy would be no gain
HF_CONFIG = "hf_config.json"


def check_target_format(format: Format, layout: Layout) -> None:
    """Refuse a format that is read alone, and a layout for one whose files follow none."""
    if format.write is None:
        written = ", ".join(row.name for row in FORMATS.values() if row.write is not None)
        raise UserError(f"convert.format={format.name}: only read; written are {written}")
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


def convert(source: str | Path, output: str | Path, *, format: Format, layout: Layout, origin: Origin) -> None:
    """Publish the checkpoint `source` as `output`, a tensor at a time; no tensor changes.

    Raises UserError for a source that is not sound, before anything of it is published.
    """
    check_target_format(format, layout)
    assert format.write is not None
    model = with_token_ids(open_checkpoint(source))
    tensors = watched(stream(model.weights), len(model.weights.names()), f"to {format.name}", unit="tensor")
    format.write(Path(output), model, tensors, origin=origin, layout=layout)


def with_token_ids(model: Checkpoint) -> Checkpoint:
    """The checkpoint with the ids that begin and end a text, where no Hugging Face config came along to say them."""
    files = model.tokenizer
    if files is None or has(files, HF_CONFIG) or model.files or not has(files, "tokenizer.json"):
        return model
    return dataclasses.replace(model, token_ids=load_tokenizer(files).special_ids())
