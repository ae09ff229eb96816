"""The ancestors of an artefact, by name, up to the first: what its manifest says beside the hashes of its parents."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.manifest import MANIFEST_FILE, manifest_sha256, read_manifest
from minitron_nemo.errors import UserError

FIELDS = {"generation": int, "role": str, "name": str, "kind": str, "sha256": str}
MOST = 10_000  # no chain of cuts comes near


def ancestors(parents: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Every ancestor of an artefact with these parents (role -> folder), the nearest generation first, each once.

    An entry has its generation (1: a parent), its role for the artefact that it was given to, the name of its folder,
    its kind and the SHA-256 of its manifest. Of an artefact older than lineages only the hashes of its parents are
    known: their name and kind are empty. Raises UserError for a manifest whose lineage cannot be read.
    """
    found: list[dict[str, Any]] = []
    for role, folder in parents.items():
        manifest = read_manifest(folder, kind=None)
        sha = manifest_sha256(folder)
        found.append(dict(generation=1, role=role, name=Path(folder).name, kind=manifest.kind, sha256=sha))
        lineage = manifest.extra.get("lineage")
        if lineage is None:
            lineage = [
                dict(generation=1, role=role, name="", kind="", sha256=sha) for role, sha in manifest.parents.items()
            ]
        found += [{**entry, "generation": entry["generation"] + 1} for entry in _checked(lineage, Path(folder))]
    found.sort(key=lambda entry: entry["generation"])  # stable: parents in their order
    nearest: dict[str, dict[str, Any]] = {}
    for entry in found:
        nearest.setdefault(entry["sha256"], entry)
    return list(nearest.values())


def _checked(lineage: Any, folder: Path) -> list[dict[str, Any]]:
    if not isinstance(lineage, list) or len(lineage) > MOST:
        raise UserError(f"{folder / MANIFEST_FILE}: lineage must be a list of ancestors")
    for entry in lineage:
        if not isinstance(entry, dict) or {name: type(value) for name, value in entry.items()} != FIELDS:
            raise UserError(f"{folder / MANIFEST_FILE}: each entry of lineage must have {', '.join(FIELDS)}")
    return lineage
