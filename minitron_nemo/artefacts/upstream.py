"""Where an imported model comes from: its name on the hub, its licence, and the files that go along with every copy.

All of it is somebody else's word: names are taken by their form, files by exact names and up to a size.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from minitron_nemo.artefacts.contents import Contents, has
from minitron_nemo.artefacts.foreign_json import read_json_in
from minitron_nemo.artefacts.paths import contained_file
from minitron_nemo.errors import UserError

UPSTREAM_FILE = "upstream.json"
LICENCE_FILES = (
    "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "NOTICE.md", "Notice", "Notice.txt",
    "USE_POLICY.md",
)  # fmt: skip
LICENCE_LIMIT = 2**20  # bytes; the longest licences of models have 30 kB
CARD = "README.md"
CARD_HEADER_LIMIT = 2**16  # bytes of a model card in which its header must end
HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_.-]{1,96}"
LICENCE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"


@dataclass(frozen=True)
class Upstream:
    """`name` on the hub, and `licence` as the hub writes it (of `other` ones its `license_name`); None: not known."""

    name: str | None = None
    licence: str | None = None

    def to_json(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()


def is_hub_name(text: str) -> bool:
    """Whether a text has the form of a model's name on the hub: `owner/model`."""
    return re.fullmatch(HUB_NAME, text) is not None


def upstream_of(folder: Path, *, given: str) -> Upstream:
    """What a Hugging Face folder and the name that it was asked for by say of its origin."""
    name = given if is_hub_name(given) and not Path(given).is_dir() else _name_in_cache(folder)
    return Upstream(name, _licence_in_card(folder))


def read_upstream(tokenizer: Contents) -> Upstream:
    """What an import wrote down beside the tokenizer; nothing known where it did not. UserError for other content."""
    if not has(tokenizer, UPSTREAM_FILE):
        return Upstream()
    values = read_json_in(tokenizer, UPSTREAM_FILE)
    for field, form in (("name", HUB_NAME), ("licence", LICENCE_NAME)):
        value = values.get(field)
        if value is not None and not (isinstance(value, str) and re.fullmatch(form, value)):
            raise UserError(
                f"{tokenizer.path / UPSTREAM_FILE}: {field}={ascii(value)[:60]}: not the form of such a name"
            )
    return Upstream(values.get("name"), values.get("licence"))


def _name_in_cache(folder: Path) -> str | None:
    """The hub name of a snapshot in the hub's cache, `models--owner--model/snapshots/<commit>`."""
    real = folder.resolve()
    kind, *parts = real.parent.parent.name.split("--", 2)
    name = "/".join(parts)
    return name if real.parent.name == "snapshots" and kind == "models" and is_hub_name(name) else None


def _licence_in_card(folder: Path) -> str | None:
    """`license` of the YAML header of a model card, or `license_name` where that is `other`; YAML is not parsed."""
    if (path := contained_file(folder, CARD)) is None:
        return None
    with path.open("rb") as file:
        text = file.read(CARD_HEADER_LIMIT).decode(errors="replace").replace("\r\n", "\n")
    if not text.startswith("---\n") or (end := text.find("\n---", 3)) < 0:
        return None
    found = {}
    for field in ("license", "license_name"):
        if match := re.search(rf"^{field}:[ \t]*(['\"]?)({LICENCE_NAME})\1[ \t]*$", text[:end], re.MULTILINE):
            found[field] = match[2]
    return found.get("license_name") if found.get("license") == "other" else found.get("license")
