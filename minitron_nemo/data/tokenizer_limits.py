"""What a stranger's tokenizer.json may ask of the tokenizers library: sizes, and texts in a time that is known.

A normalizer or a pre-tokenizer can hold regular expressions, of which some never end, and replacements that double a
text over and over. Parts that are known to go over a text once pass as they are. Any other is first tried on some texts
by a process of its own (`tokenizer_trial`), whose time and memory are limited.
"""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron_nemo.errors import UserError, shown

WORDS_LIMIT = 2**20  # four times Gemma's
ADDED_LIMIT = 2**20  # characters of all added tokens
ADDED_COUNT_LIMIT = 2**15  # of them: five times Gemma's; each takes the library as long as a hundred other words
PARTS_LIMIT = 2**20  # bytes of JSON of normalizer, pre-tokenizer, post-processor and decoder
SETTING_LIMIT = 1000  # of a number or the length of a text among the settings of a model
COUNT_LIMIT = 64  # of parts in sequence
GROWTH_LIMIT = 16  # as often as the largest of them may lengthen a text
TRIAL_SECONDS = 30  # of the clock, on a machine that does other things; the trial limits its own time of the processor
TRIED = ("normalizer", "pre_tokenizer", "decoder")
TRIAL = Path(__file__).with_name("tokenizer_trial.py")
PLAIN = {
    "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Nmt", "BertNormalizer", "ByteLevel",
    "Metaspace", "Whitespace", "WhitespaceSplit", "Digits", "Punctuation", "BertPreTokenizer", "CharDelimiterSplit",
    "UnicodeScripts", "ByteFallback", "Fuse", "WordPiece", "BPEDecoder", "Sequence", "Prepend",
}  # fmt: skip
# The expressions of Llama 3, Qwen2 and Mistral NeMo, none of which can go over a character more than a few times.
_ENDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
KNOWN_EXPRESSIONS = {
    rf"(?i:{_ENDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}",
    rf"(?i:{_ENDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{_SPACES}",
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}",
}


def check_limits(path: Path, content: dict[str, Any]) -> None:
    """Refuse a parsed tokenizer.json whose sizes are absurd, or whose parts did not get over short texts in time."""
    parts = {name: content.get(name) for name in TRIED}
    model, added = content.get("model"), content.get("added_tokens")
    if isinstance(model, dict):
        if (count := _length(model.get("vocab"))) > WORDS_LIMIT:
            raise UserError(f"{path}: a vocabulary of {count} words; at most {WORDS_LIMIT} are read")
        if (dropout := model.get("dropout")) not in (None, 0):
            raise UserError(f"{path}: model.dropout={shown(dropout)}: the ids of a text would be drawn; set it to null")
        settings = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
        for name, value in settings.items():
            size = value if name == "max_input_chars_per_word" and type(value) is int else _length(value)
            if size > SETTING_LIMIT:
                raise UserError(f"{path}: model.{name[:60]!a} is {size} or as long; at most {SETTING_LIMIT} is read")
    if (size := len(json.dumps([parts, content.get("post_processor")]))) > PARTS_LIMIT:
        raise UserError(f"{path}: normalizer, pre-tokenizer and the like have {size} bytes; at most {PARTS_LIMIT}")
    tokens = added if isinstance(added, list) else []
    if len(tokens) > ADDED_COUNT_LIMIT:
        raise UserError(f"{path}: {len(tokens)} added tokens; at most {ADDED_COUNT_LIMIT} are read")
    if sum(_length(token.get("content")) for token in tokens if isinstance(token, dict)) > ADDED_LIMIT:
        raise UserError(f"{path}: its added tokens have more than {ADDED_LIMIT} characters")
    if len(found := [part for name in TRIED for part in _flat(parts[name])]) > COUNT_LIMIT:
        raise UserError(f"{path}: {len(found)} parts of normalizer, pre-tokenizer and decoder; at most {COUNT_LIMIT}")
    if not all(_is_known(part) for part in found) or math.prod(map(_growth, found)) > GROWTH_LIMIT:
        _try(path, parts)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | dict) else 0


def _flat(part: Any) -> Iterator[dict[str, Any]]:
    """A part and those inside of it; JSON is nested at most 64 deep here."""
    if isinstance(part, dict):
        yield part
        for name in ("normalizers", "pretokenizers", "decoders"):
            inner = part.get(name)
            for other in inner if isinstance(inner, list) else []:
                yield from _flat(other)


def _is_known(part: dict[str, Any]) -> bool:
    """Whether a part goes over a text once, or as often as a known expression makes it."""
    pattern, kind = part.get("pattern"), part.get("type")
    if kind in ("Split", "Replace") and isinstance(pattern, dict):
        text = pattern.get("String")
        return isinstance(text, str) and text != "" or pattern.get("Regex") in KNOWN_EXPRESSIONS and kind == "Split"
    return isinstance(kind, str) and kind in PLAIN and _length(part.get("prepend")) <= GROWTH_LIMIT


def _growth(part: dict[str, Any]) -> float:
    """How many times as long a text can be after a part."""
    pattern, content = part.get("pattern"), part.get("content")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if part.get("type") != "Replace" or not isinstance(text, str) or not isinstance(content, str):
        return 1
    return max(1.0, len(content) / max(1, len(text)))


def _try(path: Path, parts: dict[str, Any]) -> None:
    command = [sys.executable, "-I", str(TRIAL)]
    try:
        done = subprocess.run(
            command, input=json.dumps(parts), capture_output=True, encoding="utf-8", timeout=TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        said = done.stdout.strip() if done is not None else ""
        raise UserError(
            f"{path}: its normalizer, pre-tokenizer or decoder did not get over some short texts within the time and "
            f"memory that any tokenizer needs{f' ({shown(said)})' if said else ''}; give the model's own tokenizer.json"
        )
