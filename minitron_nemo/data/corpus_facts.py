"""What is known of a prepared corpus: the `<name>.json` beside its .bin and .idx."""

from dataclasses import asdict, dataclass
from pathlib import Path

from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.errors import UserError


@dataclass
class Skipped:
    """What was left out, and how often."""

    undecodable_files: int = 0  # not UTF-8 or, when docstrings are wanted, not Python
    without_docstring: int = 0
    empty: int = 0  # documents of white space
    duplicates: int = 0

    def describe(self) -> str:
        counts = [f"{count} {name.replace('_', ' ')}" for name, count in asdict(self).items() if count]
        return f"left out: {', '.join(counts)}" if counts else "nothing left out"

    def add(self, other: "Skipped") -> None:
        for name, count in asdict(other).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True)
class CorpusFacts:
    """What `<name>.json` says about a prepared corpus."""

    documents: int
    tokens: int  # with the end-of-document token of each document, and its begin-of-sequence token where there is one
    text_bytes: int  # UTF-8, before tokenization
    skipped: Skipped
    tokenizer: str  # fingerprint
    vocab_size: int  # of the tokenizer: every id is below
    eod: int
    dtype: str
    sha256: dict[str, str]  # of the .bin and the .idx
    bos: int | None = None  # begins every document


def read_facts(path: Path) -> CorpusFacts:
    """Raises UserError for a file that is not the facts of a prepared corpus."""
    try:
        values = parse_json(path.read_bytes())
        facts = CorpusFacts(**{**values, "skipped": Skipped(**values["skipped"])})
        _check_types(facts)
        return facts
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path}: not the facts of a prepared corpus ({error}); prepare it again: python recipes/prepare_data.py"
        ) from None


def _check_types(facts: CorpusFacts) -> None:
    """Raises ValueError for a value that a reader could not use."""
    for name in ("documents", "tokens", "text_bytes", "vocab_size", "eod"):
        if type(getattr(facts, name)) is not int:
            raise ValueError(f"{name} must be a whole number")
    if facts.bos is not None and type(facts.bos) is not int:
        raise ValueError("bos must be a whole number or null")
    if not isinstance(facts.tokenizer, str) or not isinstance(facts.dtype, str):
        raise ValueError("tokenizer and dtype must be strings")
    hashes = facts.sha256
    if (
        not isinstance(hashes, dict)
        or set(hashes) != {"bin", "idx"}
        or not all(isinstance(h, str) for h in hashes.values())
    ):
        raise ValueError("sha256 must be the hashes of bin and idx")
