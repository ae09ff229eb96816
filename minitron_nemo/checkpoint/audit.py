"""What a checkpoint is and whether it is sound, without a GPU, a process group or a model: the checks of every opening.

A recipe that opens a checkpoint goes through the same functions; here they are only told of.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.contents import Place, contents_of, has
from minitron_nemo.artefacts.disk import in_bytes
from minitron_nemo.artefacts.manifest import MANIFEST_FILE, read_manifest, verify_files
from minitron_nemo.artefacts.signature import is_there, verify
from minitron_nemo.checkpoint.finite import is_finite
from minitron_nemo.checkpoint.formats.checkpoint import Checkpoint
from minitron_nemo.checkpoint.formats.known import format_of, open_checkpoint
from minitron_nemo.errors import UserError, printable
from minitron_nemo.progress import watched

SIGNATURES = {
    "none": "none",
    "not verified": "there, not verified",
    "verified": "verified: the key that was given signed the hashes",
}


@dataclass(frozen=True)
class Audit:
    """What is known of a checkpoint; `fault` is why it is not sound, None when it is. Facts that were not reached lack.

    `hashes` are the files whose SHA-256 hold, None where nobody wrote any down; `finite` is None when values were not
    looked at. `signature` is `verified`, by the key that was given, `not verified`, or `none` where there is none.
    """

    path: str
    fault: str | None = None
    format: str | None = None
    shape: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    precision: str | None = None
    bytes: int | None = None
    tensors: int | None = None
    tied: bool | None = None
    signature: str = "none"
    hashes: int | None = None
    finite: bool | None = None
    tokenizer: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_sound(self) -> bool:
        return self.fault is None

    def to_dict(self) -> dict[str, Any]:
        return {"sound": self.is_sound, **dataclasses.asdict(self)}


def audit(place: Place, *, hashes: bool = True, values: bool = False, key: str | Path | None = None) -> Audit:
    """Look at everything that can be wrong with a checkpoint; with `values` at every weight, which reads them all.

    Without `hashes` files are told by their sizes alone. With the public `key` only what it signed is sound, and hashes
    are looked at all the same, as a signature is of those. Never raises for what lies there.
    """
    found = Audit(str(place if isinstance(place, str | Path) else place.path))
    try:
        contents = contents_of(place)
        found = dataclasses.replace(found, format=format_of(contents).name)
        found = dataclasses.replace(found, signature="not verified" if is_there(contents) else "none")
        if key is not None:
            verify(contents, key)
            found = dataclasses.replace(found, signature="verified")
        checkpoint = open_checkpoint(contents, hashes=False)
        found = _facts(found, checkpoint)
        if (hashes or key is not None) and has(contents, MANIFEST_FILE):
            manifest = read_manifest(contents, kind=None)
            verify_files(contents, manifest)
            found = dataclasses.replace(found, hashes=len(manifest.files))
        if values:
            _check_values(checkpoint)
            found = dataclasses.replace(found, finite=True)
    except UserError as error:
        return dataclasses.replace(found, fault=str(error), finite=None)
    return found


def _facts(found: Audit, checkpoint: Checkpoint) -> Audit:
    arch, dtype = checkpoint.arch, checkpoint.dtype
    return dataclasses.replace(
        found,
        shape=arch.to_dict(),
        parameters=arch.num_params(),
        precision=str(dtype).removeprefix("torch."),
        bytes=arch.num_params() * dtype.itemsize,
        tensors=len(checkpoint.weights.names()),
        tied=arch.share_embeddings_and_output_weights,
        tokenizer=checkpoint.tokenizer is not None and bool(checkpoint.tokenizer.names()),
        notes=checkpoint.notes,
    )


def _check_values(checkpoint: Checkpoint) -> None:
    names = checkpoint.weights.names()
    for name in watched(iter(names), len(names), "audit", unit="tensor"):
        if not is_finite(checkpoint.weights.read(name)):
            raise UserError(f"{checkpoint.path}: tensor {name} is not all finite numbers")


def in_lines(audit: Audit) -> str:
    """For people: a line for each fact, the verdict first."""
    lines = [f"{audit.path}: {'sound' if audit.is_sound else 'NOT SOUND'}"]
    if audit.fault is not None:
        lines.append(f"  fault      {audit.fault}")
    if audit.format is not None:
        lines.append(f"  format     {audit.format}")
    if audit.parameters is not None and audit.bytes is not None:
        shape, head = audit.shape, "tied to the embedding" if audit.tied else "its own"
        lines += [
            f"  shape      {shape['family']}: {shape['num_layers']} layers, hidden {shape['hidden_size']}, "
            f"ffn {shape['ffn_hidden_size']}, {shape['num_attention_heads']} heads in {shape['num_query_groups']} "
            f"groups of {shape['kv_channels']}, vocabulary {shape['vocab_size']}",
            f"  weights    {audit.parameters} parameters in {audit.precision}, {in_bytes(audit.bytes)}",
            f"  tensors    {audit.tensors}, all there and each covered exactly once; the output head is {head}",
            f"  tokenizer  {'there' if audit.tokenizer else 'none'}",
        ]
    if audit.format is not None:
        lines.append(f"  signature  {SIGNATURES[audit.signature]}")
    if audit.is_sound:
        held = f"those of {audit.hashes} files hold" if audit.hashes else "none to go by, or not looked at"
        lines.append(f"  hashes     {held}")
        lines.append(f"  values     {'all finite' if audit.finite else 'not looked at'}")
    return "\n".join(map(printable, [*lines, *(f"  note       {note}" for note in audit.notes)]))
