"""Every format that a checkpoint can have: how it is told from the others, opened and written.

One row each; conversions, audits and their settings go by this table.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from torch import Tensor

from minitron_nemo.artefacts.contents import Contents, Place, TarContents, contents_of, has
from minitron_nemo.artefacts.manifest import MANIFEST_FILE, check_signed, read_manifest, verify_files
from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.artefacts.signature import is_asked_for
from minitron_nemo.checkpoint.formats import hf, megatron, nemo, nemo1, nemo2, nemo_state_dict
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.errors import UserError, shown


class Write(Protocol):
    """Publishes a checkpoint of any format in one: `tensors` is its stream, `layout` whose files it is split into."""

    def __call__(
        self,
        output: Path,
        model: Checkpoint,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        origin: Origin,
        layout: Layout,
    ) -> None: ...


@dataclass(frozen=True)
class Format:
    """A row of the table. `known_by` tells people what it is recognised by; `kind` is that of the artefact written.

    `splits`: whether its weights can be in the files of a layout.
    """

    name: str
    known_by: str
    recognise: Callable[[Contents], bool]
    open: Callable[[Contents], Checkpoint]
    kind: str = ""
    write: Write | None = None
    splits: bool = False


def _is_tar(contents: Contents) -> bool:
    return isinstance(contents, TarContents)


FORMATS = {row.name: row for row in (
    Format(nemo.NAME, "manifest.json of a model, in a folder", lambda c: not _is_tar(c) and nemo.recognise(c),
           nemo.open_checkpoint, nemo.KIND, nemo.write, splits=True),
    Format(nemo.TAR_NAME, "the same in one uncompressed tar", lambda c: _is_tar(c) and nemo.recognise(c),
           nemo.open_checkpoint, nemo.KIND, partial(nemo.write, packed=True)),
    Format(nemo_state_dict.NAME, "model_weights.ckpt beside the config of a MinitronGPT", nemo_state_dict.recognise,
           nemo_state_dict.open_checkpoint),
    Format(hf.KIND, "config.json beside *.safetensors", hf.recognise, hf.open_checkpoint, hf.KIND, hf.write),
    Format(nemo1.NAME, "model_config.yaml of NeMo 1, in a folder", lambda c: not _is_tar(c) and nemo1.recognise(c),
           nemo1.open_checkpoint, nemo1.NAME, nemo1.write, splits=True),
    Format(nemo1.TAR_NAME, "the same in one uncompressed tar", lambda c: _is_tar(c) and nemo1.recognise(c),
           nemo1.open_checkpoint, nemo1.NAME, partial(nemo1.write, packed=True)),
    Format(nemo2.NAME, "context/ and weights/", nemo2.recognise, nemo2.open_checkpoint, nemo2.NAME, nemo2.write,
           splits=True),
    Format(megatron.NAME, "iter_XXXXXXX with .metadata", megatron.recognise, megatron.open_checkpoint, megatron.NAME,
           megatron.write, splits=True),
    # Read as the row above; what only Megatron-Core 0.19 and later take, so it is written when asked for.
    Format("megatron_019", "the same", lambda contents: False, megatron.open_checkpoint, megatron.NAME,
           partial(megatron.write, common_is_object=True), splits=True),
)}  # fmt: skip


def written_format(name: str) -> Format:
    """The row of a format that is written; UserError for another name."""
    if (row := FORMATS.get(name)) is None or row.write is None:
        written = ", ".join(row.name for row in FORMATS.values() if row.write is not None)
        raise UserError(f"format={shown(name)}: not one that is written; those are {written}")
    return row


def format_of(place: Place) -> Format:
    """The format of what lies there; UserError, with what every format is known by, where it is none of them."""
    contents = contents_of(place)
    for known in FORMATS.values():
        if known.recognise(contents):
            return known
    if not contents.names():
        raise UserError(f"{contents.path}: no such checkpoint, or an empty folder")
    lines = ", ".join(f"{known.name} ({known.known_by})" for known in FORMATS.values() if known.known_by != "the same")
    raise UserError(f"{contents.path}: no checkpoint of a known format: {lines}")


def open_checkpoint(place: Place, *, hashes: bool = True) -> Checkpoint:
    """A checkpoint of any format, its config, names, shapes and coverage checked, with `hashes` those that it has too.

    Those of the weights of a model artefact are judged at the end of their stream. Where only what a key signed may be
    opened, a checkpoint of any format must have a manifest, signed by it, whose hashes hold. Raises UserError in one
    line for what is damaged, incomplete, hostile or of no known format.
    """
    contents = contents_of(place)
    found = format_of(contents)
    if found.kind != nemo.KIND:  # which does all of this when it is opened
        check_signed(contents, kind=found.kind)
        # Of another kind the manifest may leave out what makes this format, and dot files pass unlisted.
        manifest = read_manifest(contents, kind=found.kind) if has(contents, MANIFEST_FILE) else None
        if manifest is not None and hashes and not is_asked_for():
            verify_files(contents, manifest)
    return found.open(contents)
