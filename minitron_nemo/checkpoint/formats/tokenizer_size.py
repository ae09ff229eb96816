"""How many words the tokenizer of somebody else's checkpoint has, from its files alone."""

from typing import Any

from minitron_nemo.artefacts.contents import Contents, has, read_small
from minitron_nemo.artefacts.foreign_json import read_json_in
from minitron_nemo.errors import UserError

_LENGTH_DELIMITED, _PIECES = 2, 1  # wire type and field number of sentencepiece's `ModelProto.pieces`
_WIDTHS = {1: 8, 5: 4}  # bytes of the wire types of fixed width


def tokenizer_size(files: Contents) -> int | None:
    """Words in `tokenizer.json`, else pieces in `tokenizer.model` of sentencepiece; None where neither is there."""
    if has(files, "tokenizer.json"):
        return _size_of_json(files)
    if has(files, "tokenizer.model"):
        try:
            return _pieces(read_small(files, "tokenizer.model"))
        except (ValueError, IndexError):
            raise UserError(f"{files.path / 'tokenizer.model'}: not a model of sentencepiece") from None
    return None


def _size_of_json(files: Contents) -> int | None:
    content = read_json_in(files, "tokenizer.json")
    model, added = content.get("model"), content.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids: list[Any] = list(vocab.values()) if isinstance(vocab, dict) else []
    if isinstance(vocab, list):  # of a Unigram model: its place is the number of a word
        ids = [len(vocab) - 1]
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, dict)]
    return max((ident for ident in ids if type(ident) is int), default=-1) + 1 or None


def _pieces(data: bytes) -> int:
    """Entries of the first field of a protocol buffer, whose other fields are passed over."""
    place, count = 0, 0
    while place < len(data):
        key, place = _varint(data, place)
        if key & 7 == _LENGTH_DELIMITED:
            length, place = _varint(data, place)
            count += key >> 3 == _PIECES
            place += length
        elif key & 7 == 0:
            _, place = _varint(data, place)
        else:
            place += _WIDTHS.get(key & 7) or _refuse()
    return count if place == len(data) and count else _refuse()


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    return _refuse(), place


def _refuse() -> int:
    raise ValueError
