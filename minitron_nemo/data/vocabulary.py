"""Which words of a tokenizer may go, and in which order: what a vocabulary can be pruned to.

A BPE word is reached only through its merges, so a word needs the two words that it is merged from. What decodes any
text stays: special and added tokens, and the tokens of single bytes. The rest stay by their frequency.
"""

import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.contents import Contents, Place, contents_of, has
from minitron_nemo.artefacts.foreign_json import read_json_in
from minitron_nemo.data.tokenizer import open_backend
from minitron_nemo.errors import UserError, shown

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Files beside tokenizer.json that name tokens by their ids, as `bos_token_id` and the like.
NAMING_FILES = ("tokenizer_config.json", "generation_config.json", "hf_config.json")
Pair = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The words of a `tokenizer.json` of byte-level or byte-fallback BPE, checked; `read_vocabulary` makes it.

    `size` is the model's: rows of its embedding, of which some may have no word. `needed` are ids that must stay,
    each with the reason.
    """

    source: str
    size: int
    words: dict[int, str]
    merges: list[Pair]
    needed: dict[int, str]
    added: frozenset[int] = field(default_factory=frozenset)

    @cached_property
    def parts(self) -> dict[int, tuple[int, int]]:
        """Each merged word's two parts: the last merge that BPE makes of its characters."""
        ids = {word: ident for ident, word in self.words.items()}
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        makers: dict[str, list[Pair]] = {}
        for pair in self.merges:
            makers.setdefault("".join(pair), []).append(pair)
        found = {}
        for word, pairs in makers.items():
            # Converted tokenizers list every split of a word; which one is used follows from the ranks.
            used = pairs[0] if len(pairs) == 1 else _last_merge(word, ranks)
            if used is not None and word in ids and ids[word] not in self.added:
                found[ids[word]] = (ids[used[0]], ids[used[1]])
        return found

    def ranked(self, counts: Sequence[float]) -> list[int]:
        """Every id, the first to keep first, so that any beginning of the list is closed under the merges.

        Needed words come first, then by frequency, a word counting as often as the most frequent that it is a part
        of; of equals the lower id. Rows without a word come last.
        """
        value = [float(count) for count in counts]
        for ident in self.needed:
            value[ident] = float("inf")
        whole = sorted(self.parts, key=lambda ident: len(self.words[ident]), reverse=True)  # parts are shorter
        for ident in whole:
            for part in self.parts[ident]:
                value[part] = max(value[part], value[ident])
        return self._in_order(value)

    def _in_order(self, value: Sequence[float]) -> list[int]:
        """By value, but no word before its parts; of those that could come next, the lower id."""
        waits = {ident: set(parts) for ident, parts in self.parts.items()}
        used_in: dict[int, list[int]] = {}
        for ident, parts in waits.items():
            for part in parts:
                used_in.setdefault(part, []).append(ident)
        ready = [(-value[ident], ident) for ident in self.words if ident not in waits]
        heapq.heapify(ready)
        order = []
        while ready:
            _, ident = heapq.heappop(ready)
            order.append(ident)
            for whole in used_in.get(ident, ()):
                waits[whole].discard(ident)
                if not waits[whole]:
                    heapq.heappush(ready, (-value[whole], whole))
        return order + [ident for ident in range(self.size) if ident not in self.words]

    @cached_property
    def closed_needs(self) -> set[int]:
        """The ids that must stay and all that they are merged from."""
        found, new = set[int](), list(self.needed)
        while new:
            ident = new.pop()
            if ident not in found:
                found.add(ident)
                new += self.parts.get(ident, ())
        return found

    def check_size(self, size: int) -> None:
        """Refuse a size that has no room for what must stay."""
        if size < (least := len(self.closed_needs)):
            raise UserError(
                f"vocab_size={size}: special tokens, bytes and what they are merged from need {least} of "
                f"{self.source}'s words"
            )

    def check_kept(self, kept: Iterable[int], *, name: str) -> None:
        """Refuse kept ids without one that must stay, or without a part of one that stays."""
        stays = set(kept)
        if gone := sorted(set(self.needed) - stays):
            raise UserError(f"{name}: drops id {gone[0]} ({self._show(gone[0])}), {self.needed[gone[0]]}; keep it")
        for ident in sorted(stays & set(self.parts)):
            for part in self.parts[ident]:
                if part not in stays:
                    raise UserError(
                        f"{name}: keeps id {ident} ({self._show(ident)}) and drops {part} ({self._show(part)}), which "
                        "it is merged from: no text would reach it; keep both or neither"
                    )

    def _show(self, ident: int) -> str:
        return shown(self.words.get(ident, ""))


def _last_merge(word: str, ranks: Mapping[Pair, int]) -> Pair | None:
    """The two parts that BPE has last when it makes a word of its characters; None where it never does."""
    symbols = list(word)
    while len(symbols) > 2:
        pairs = [(rank, at) for at in range(len(symbols) - 1) if (rank := ranks.get((symbols[at], symbols[at + 1])))
                 is not None]  # fmt: skip
        if not pairs:
            return None
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    pair = (symbols[0], symbols[-1])
    return pair if len(symbols) == 2 and pair in ranks else None


def read_vocabulary(folder: Place, *, size: int) -> Vocabulary:
    """The vocabulary of the tokenizer in `folder`, of a model with `size` rows.

    Raises UserError for a tokenizer whose words cannot be pruned: another model than BPE, one that can not spell every
    text in bytes, one with random merges, ids that the model does not have.
    """
    files = contents_of(folder)
    path, content = files.path / "tokenizer.json", read_json_in(files, "tokenizer.json")
    model = bpe_of(content, source=str(path))
    words, added = _words(content, model, source=str(path), size=size)
    ids = {word: ident for ident, word in words.items()}
    merges = [_pair(merge, path) for merge in model["merges"]]
    for pair in merges:
        for word in (*pair, "".join(pair)):
            if word not in ids:
                raise UserError(f"{path}: a merge names {ascii(word)[:40]}, which is no word of the vocabulary")
    open_backend(path, content)  # from here on the file has the form that the library reads
    needed = {ids[word]: "a token of single bytes" for word in _spelling(content, model, ids, source=str(path))}
    needed |= {ident: "named in the files beside the tokenizer" for ident in _named(files) if ident in words}
    tokens = [model.get("unk_token"), *_special_words(content.get("post_processor"))]
    needed |= {ids[word]: "a token that the tokenizer itself puts in" for word in tokens if word in ids}
    needed |= dict.fromkeys(added, "a special or added token")
    return Vocabulary(str(path), size, words, merges, needed, frozenset(added))


def bpe_of(content: dict[str, Any], *, source: str) -> dict[str, Any]:
    """The BPE model of a tokenizer; UserError for what cannot be pruned."""
    model = content.get("model")
    kind = model.get("type", "BPE" if "merges" in model else None) if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise UserError(f"{source}: a vocabulary of type {kind}: only byte-level and byte-fallback BPE can be pruned")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise UserError(f"{source}: {name}={model[name]!r}: a BPE with it cannot be pruned")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise UserError(f"{source}: a BPE needs a mapping `vocab` and a list `merges`")
    return model


def _words(
    content: dict[str, Any], model: dict[str, Any], *, source: str, size: int
) -> tuple[dict[int, str], dict[int, str]]:
    """(id -> word, and of these the added tokens)"""
    added = {}
    for token in content.get("added_tokens") or []:
        if not isinstance(token, dict) or not isinstance(token.get("content"), str) or type(token.get("id")) is not int:
            raise UserError(f"{source}: added_tokens must be objects with a content and an id")
        added[token["id"]] = token["content"]
    words: dict[int, str] = {}
    for word, ident in [*model["vocab"].items(), *((word, ident) for ident, word in added.items())]:
        if type(ident) is not int or not 0 <= ident < size:
            raise UserError(f"{source}: {ascii(word)[:40]} has the id {ident!r}, the model has ids 0..{size - 1}")
        if words.setdefault(ident, word) != word:
            raise UserError(f"{source}: {ascii(word)[:40]} and {ascii(words[ident])[:40]} share the id {ident}")
    if len(set(words.values())) != len(words):
        raise UserError(f"{source}: a word has two ids")
    return words, added


def _pair(merge: Any, path: Path) -> Pair:
    """A merge, written as a list or as a text with a space in between."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise UserError(f"{path}: a merge is no pair: {ascii(merge)[:40]}")
    return parts[0], parts[1]


def _spelling(content: dict[str, Any], model: dict[str, Any], words: Iterable[str], *, source: str) -> set[str]:
    """The words that spell any text: those of single bytes, and characters that have no bytes to fall back to."""
    bytes_ = {word for word in words if BYTE.fullmatch(word)}
    characters = {word for word in words if len(word) == 1}
    types = {kind for part in ("normalizer", "pre_tokenizer", "decoder") for kind in _types(content.get(part))}
    if model.get("byte_fallback"):
        falls_back = len(bytes_) == 256 and "ByteFallback" in types
        return bytes_ if falls_back else bytes_ | characters
    if "ByteLevel" not in types:
        raise UserError(
            f"{source}: neither byte-level nor with byte fallback: with fewer words some texts could not be spelled"
        )
    return characters


def _types(part: Any) -> Iterable[str]:
    """The types of a component of a tokenizer and of those inside it."""
    if isinstance(part, dict):
        yield str(part.get("type"))
        for inner in part.values():
            yield from _types(inner) if isinstance(inner, list) else ()
    elif isinstance(part, list):
        for inner in part:
            yield from _types(inner)


def _special_words(processor: Any) -> Iterable[str]:
    """The words that a post-processor puts around a text."""
    if not isinstance(processor, dict):
        return
    for inner in processor.get("processors") or []:
        yield from _special_words(inner)
    for special in (processor.get("special_tokens") or {}).values():
        yield from special.get("tokens") or []
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            yield processor[name][0]


def is_id_key(key: str) -> bool:
    """Whether a key of a configuration holds the id of a token, or a list of them."""
    return key.endswith(("_token_id", "_token_ids"))


def _named(files: Contents) -> Iterable[int]:
    """Ids that the files beside the tokenizer name."""
    for name in NAMING_FILES:
        if has(files, name):
            for key, value in read_json_in(files, name).items():
                if is_id_key(key):
                    yield from (ident for ident in (value if isinstance(value, list) else [value])
                                if type(ident) is int)  # fmt: skip
