"""The files of a tokenizer of which only some words are left: ids counted anew, in the order they had."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron_nemo.artefacts.contents import Place, contents_of, has, read_small
from minitron_nemo.artefacts.foreign_json import read_json_in
from minitron_nemo.artefacts.strict_json import parse_json
from minitron_nemo.artefacts.upstream import LICENCE_FILES, UPSTREAM_FILE
from minitron_nemo.data.tokenizer import open_backend
from minitron_nemo.data.vocabulary import bpe_of, is_id_key, read_vocabulary
from minitron_nemo.errors import UserError

# Written as they are: they name tokens by their text, or none. tokenizer.model and vocab.txt cannot follow and are left
# out.
WITHOUT_IDS = (
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json", UPSTREAM_FILE, *LICENCE_FILES
)  # fmt: skip
FILTERED = ("suppress_tokens", "begin_suppress_tokens")
Ids = Mapping[int, int]  # old id -> new id


def pruned_tokenizer(folder: Place, kept: Sequence[int]) -> dict[str, bytes]:
    """The tokenizer files of a folder, by name, for a model that keeps these rows (ascending) of its vocabulary.

    Raises UserError when the tokenizers library would not give the words the ids of their rows.
    """
    source, ids = contents_of(folder), {old: new for new, old in enumerate(kept)}
    path = source.path / "tokenizer.json"
    content = {"added_tokens": [], **read_json_in(source, "tokenizer.json")}
    pruned = _tokenizer(content, ids, source=str(path))
    _check(content, pruned, path=path)
    files = {"tokenizer.json": pruned}
    for name in ("tokenizer_config.json", "generation_config.json", "hf_config.json"):
        if has(source, name):
            files[name] = _configuration(read_json_in(source, name), ids, size=len(kept))
    for name in ("added_tokens.json", "vocab.json"):
        if has(source, name):
            files[name] = {word: ids[old] for word, old in read_json_in(source, name).items() if old in ids}
    written = {name: (json.dumps(values, indent=2) + "\n").encode() for name, values in files.items()}
    for name in WITHOUT_IDS:
        if has(source, name):
            written[name] = read_small(source, name)
    if has(source, "merges.txt"):
        written["merges.txt"] = "\n".join(["#version: 0.2", *map(_text, pruned["model"]["merges"]), ""]).encode()
    return written


def rows_kept(fewer: Place, whole: Place, *, fewer_size: int, whole_size: int) -> tuple[int, ...]:
    """The row of the whole vocabulary behind each row of the one with fewer words, ascending.

    Both are tokenizer folders, with the rows of their models. Raises UserError when the one is not what pruning the
    other leaves: the same text would be other tokens, or a token another word.
    """
    ours, theirs = read_vocabulary(fewer, size=fewer_size), read_vocabulary(whole, size=whole_size)
    ids = {word: ident for ident, word in theirs.words.items()}
    kept = [ids.get(ours.words.get(row, ""), -1) for row in range(fewer_size)]
    if min(kept) < 0 or kept != sorted(set(kept)):
        row = next(row for row, old in enumerate(kept) if old < 0 or row and old <= kept[row - 1])
        raise UserError(
            f"{ours.source}: id {row} ({ours.words.get(row)!a:.40}) is no word of {theirs.source} or not in its order; "
            "models are compared over one vocabulary, or over one that was pruned from the other"
        )
    made = parse_json(pruned_tokenizer(whole, kept)["tokenizer.json"])
    if made != {"added_tokens": [], **read_json_in(contents_of(fewer), "tokenizer.json")}:
        raise UserError(
            f"{ours.source} has words of {theirs.source} but is not what pruning it leaves; give the tokenizer that "
            "recipes/prune.py wrote"
        )
    return tuple(kept)


def _tokenizer(content: dict[str, Any], ids: Ids, *, source: str) -> dict[str, Any]:
    model = bpe_of(content, source=source)
    vocab = {word: ids[old] for word, old in sorted(model["vocab"].items(), key=lambda entry: entry[1]) if old in ids}
    # A merge whose parts and result all stay: those that make the words that stay, in their order.
    merges = [merge for merge in model["merges"] if {*(pair := _parts(merge)), "".join(pair)} <= vocab.keys()]
    added = [{**token, "id": ids[token["id"]]} for token in content.get("added_tokens") or []]
    padding = content.get("padding")
    if isinstance(padding, dict) and padding.get("pad_id") in ids:
        padding = {**padding, "pad_id": ids[padding["pad_id"]]}
    return {
        **content,
        "padding": padding,
        "added_tokens": added,
        "post_processor": _processor(content.get("post_processor"), ids),
        "model": {**model, "vocab": vocab, "merges": merges},
    }


def _processor(processor: Any, ids: Ids) -> Any:
    """A post-processor with the new ids of what it puts around a text."""
    if not isinstance(processor, dict):
        return processor
    changed = dict(processor)
    if isinstance(inner := processor.get("processors"), list):
        changed["processors"] = [_processor(part, ids) for part in inner]
    if isinstance(special := processor.get("special_tokens"), dict):
        changed["special_tokens"] = {
            name: {**token, "ids": [ids[old] for old in token["ids"]]} for name, token in special.items()
        }
    for name in ("sep", "cls"):
        if isinstance(pair := processor.get(name), list):
            changed[name] = [pair[0], ids[pair[1]]]
    return changed


def _configuration(values: dict[str, Any], ids: Ids, *, size: int) -> dict[str, Any]:
    """A configuration whose ids are the new ones; one that names no row of the model stays as it is."""

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(entry) for entry in value]
        return ids.get(value, value) if type(value) is int else value

    changed = {key: renamed(value) if is_id_key(key) else value for key, value in values.items()}
    for key in FILTERED:
        if isinstance(values.get(key), list):
            changed[key] = [ids[old] for old in values[key] if type(old) is int and old in ids]
    if isinstance(listed := values.get("bad_words_ids"), list):
        lists = [words for words in listed if isinstance(words, list)]
        changed["bad_words_ids"] = [
            [ids[old] for old in words] for words in lists if all(type(old) is int and old in ids for old in words)
        ]
    if isinstance(decoder := values.get("added_tokens_decoder"), dict):
        changed["added_tokens_decoder"] = {
            str(ids[int(old)]): token for old, token in decoder.items() if old.isdecimal() and int(old) in ids
        }
    if "vocab_size" in values:
        changed["vocab_size"] = size
    return changed


def _check(content: dict[str, Any], pruned: dict[str, Any], *, path: Path) -> None:
    """Refuse a tokenizer to whose words the library gives other ids than the file, before the cut or after it.

    The library counts added tokens from the number of words, so ids with holes are not what they seem.
    """
    for values in (content, pruned):
        written = {**values["model"]["vocab"], **{token["content"]: token["id"] for token in values["added_tokens"]}}
        given = open_backend(path, values).get_vocab(with_added_tokens=True)
        for word in sorted({*written, *given}):
            if given.get(word) != written.get(word):
                raise UserError(
                    f"{path}: {ascii(word)[:40]} has the id {written.get(word)} in the file and {given.get(word)} in "
                    "the tokenizers library: a vocabulary whose ids have holes cannot be pruned"
                )


def _parts(merge: Any) -> tuple[str, ...]:
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)


def _text(merge: Any) -> str:
    return " ".join(_parts(merge))
