"""Where an artefact comes from: what every writer writes down, and by which a finished step is known again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Origin:
    """`fingerprint` identifies what determined the content: the kind, `config` and `parents` in one hash.

    `config` holds the settings that shaped it, as plain data; `parents` maps a role (such as "teacher") to the SHA-256
    of that artefact's manifest; `overwrite` allows the new artefact to take the place of an older one; `command` is the
    command line that asked for it, for people. `lineage` names every ancestor, the nearest first
    (`artefacts.lineage`); it follows from the parents, so the fingerprint need not hold it.
    """

    fingerprint: str
    config: Mapping[str, Any] = field(default_factory=dict)
    parents: Mapping[str, str] = field(default_factory=dict)
    overwrite: bool = False
    command: str = ""
    lineage: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def of(
        cls,
        kind: str,
        config: Mapping[str, Any],
        *,
        parents: Mapping[str, str] | None = None,
        overwrite: bool = False,
        command: str = "",
        lineage: Sequence[Mapping[str, Any]] = (),
    ) -> "Origin":
        """The origin of an artefact of this kind, its fingerprint taken over all that determines the content."""
        parents = dict(parents or {})
        fingerprint = fingerprint_of(kind, config, parents)
        return cls(fingerprint, config, parents, overwrite, command, lineage)


def fingerprint_of(*parts: Any) -> str:
    """SHA-256, in hex, of JSON-able values; the order of keys does not matter."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
