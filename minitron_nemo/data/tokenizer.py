"""The tokenizer of a model: opened from its `tokenizer.json`, or trained as a byte-level BPE."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minitron_nemo.artefacts.contents import Contents, Place, contents_of, has
from minitron_nemo.artefacts.foreign_json import read_json_in
from minitron_nemo.artefacts.manifest import check_signed
from minitron_nemo.data.tokenizer_limits import check_limits
from minitron_nemo.errors import UserError, shown

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # the 256 bytes and END_OF_TEXT
INSIDE = "tokenizer"  # the folder of a .nemo model
MAX_VOCAB = 2**31 - 1  # what Megatron's largest dtype for tokens can hold


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. What begins and ends a document is not among the ids: `bos` and `eod` say it."""

    files: Contents
    eod: int  # id that ends every document
    fingerprint: str  # sha256 of everything that decides which ids come out
    backend: tokenizers.Tokenizer = field(repr=False, compare=False)

    @property
    def folder(self) -> Path:
        """Where its files lie, for messages."""
        return self.files.path

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one; ids may have holes, so this is not the number of tokens."""
        return _size(self.backend)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; several times faster than one by one, as offsets into the text are not kept."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def bos(self, add: bool | None = None) -> int | None:
        """The id that begins every document, None where none does.

        `add=None`: as the tokenizer's own post-processor does for a text (Llama-3's and Mistral's put a token first),
        False: none, True: the `bos_token` of the folder. UserError when there is no such token, or more than one.
        """
        if add is False:
            return None
        if add is True:
            ident = _special_id(self.files, self.backend, "bos")
            if ident is None:
                raise UserError(
                    f"{self.folder}: prepare_data.add_bos=true, and no begin-of-sequence token is known; set bos_token "
                    "in tokenizer_config.json (or bos_token_id in config.json)"
                )
            return ident
        first = self._put_first()
        if len(first) > 1:
            raise UserError(
                f"{self.folder}: its post-processor puts {len(first)} tokens before a text, {first[:4]}; say with "
                "prepare_data.add_bos=true (bos_token) or false what begins a document"
            )
        return first[0] if first else None

    def _put_first(self) -> list[int]:
        """The ids that the post-processor puts before those of a text."""
        encoding = self.backend.encode("a", add_special_tokens=True)
        of_the_text = encoding.special_tokens_mask.index(0) if 0 in encoding.special_tokens_mask else 0
        return list(encoding.ids[:of_the_text])

    def special_ids(self) -> dict[str, int]:
        """`bos_token_id` (where one is known) and `eos_token_id`, as a model's `config.json` names them."""
        bos = _special_id(self.files, self.backend, "bos")
        return {**({} if bos is None else {"bos_token_id": bos}), "eos_token_id": self.eod}

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


def load_tokenizer(place: Place) -> Tokenizer:
    """The tokenizer of a folder with a tokenizer.json, or of a .nemo model, which has it under tokenizer/.

    Raises UserError for a missing or unreadable tokenizer.json, when no end-of-document token is known, and for that of
    a model which a trusted key did not sign.
    """
    files = contents_of(place)
    if not has(files, "tokenizer.json") and (inner := files.inside(INSIDE)).names():
        check_signed(files, kind="model", under=f"{INSIDE}/")
        files = inner
    folder, path = files.path, files.path / "tokenizer.json"
    if not has(files, "tokenizer.json"):
        if has(files, "tokenizer.model"):
            raise UserError(
                f"{folder}: has only tokenizer.model (sentencepiece); convert it to tokenizer.json with "
                "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        raise UserError(
            f"{folder}: no tokenizer.json; put the model's tokenizer.json and tokenizer_config.json there, or give "
            "another folder that has them (`python recipes/train_tokenizer.py` makes one), such as a .nemo folder"
        )
    content = read_json_in(files, "tokenizer.json")
    backend = open_backend(path, content)
    # A tokenizer.json may carry the truncation and padding of its last use: they would cut documents.
    backend.no_truncation()
    backend.no_padding()
    eod = _special_id(files, backend, "eos")
    if eod is None:
        raise UserError(
            f"{folder}: no end-of-document token; set eos_token in tokenizer_config.json (or eos_token_id in "
            "config.json)"
        )
    decisive = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    text = json.dumps([decisive, eod], sort_keys=True, separators=(",", ":"))
    return Tokenizer(files=files, eod=eod, fingerprint=hashlib.sha256(text.encode()).hexdigest(), backend=backend)


def open_backend(path: Path, content: dict[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer of a parsed tokenizer.json; UserError naming `path` for one that it does not take."""
    check_limits(path, content)
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and its panics are not even that
        raise UserError(f"{path}: the tokenizers library cannot open it: {' '.join(str(error).split())}") from None
    if not 0 < (size := _size(backend)) <= MAX_VOCAB:
        raise UserError(f"{path}: has ids for a vocabulary of {size}; allowed are 1 to {MAX_VOCAB}")
    return backend


def _size(backend: tokenizers.Tokenizer) -> int:
    """The largest id plus one; ids may have holes, so this is not the number of tokens."""
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _special_id(files: Contents, backend: tokenizers.Tokenizer, which: str) -> int | None:
    """Id of `<which>_token` in tokenizer_config.json, else `<which>_token_id` of the model's configuration, else None.

    `which` is eos or bos. Raises UserError for one that is given and is no token of the vocabulary.
    """
    if has(files, "tokenizer_config.json"):
        path = files.path / "tokenizer_config.json"
        token = read_json_in(files, "tokenizer_config.json").get(f"{which}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            if not isinstance(token, str):
                raise UserError(f"{path}: {which}_token={shown(token)}: must be a string, a token of tokenizer.json")
            # A lone surrogate is no text, and the library cannot be asked for it.
            ident = None if any(0xD800 <= ord(c) < 0xE000 for c in token) else backend.token_to_id(token)
            if ident is None:
                raise UserError(f"{path}: {which}_token {shown(token)} is not in the vocabulary of tokenizer.json")
            return int(ident)
    size = _size(backend)
    for name in ("generation_config.json", "config.json", "hf_config.json"):
        if has(files, name):
            path, given = files.path / name, read_json_in(files, name).get(f"{which}_token_id")
            if given is None:
                continue
            ident = given[0] if isinstance(given, list) and given else given
            if type(ident) is not int or not 0 <= ident < size:
                raise UserError(
                    f"{path}: {which}_token_id={shown(given)}: must be a token id of tokenizer.json, 0..{size - 1}"
                )
            return ident
    return None


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, output: Path) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` ids trained on `texts`, written to `output` as Hugging Face files.

    Id 0 is `<|endoftext|>` (begin, end and padding), then the 256 bytes, then merges, most frequent first. The same
    texts give the same bytes. Raises UserError when the texts are too few for so many merges.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(f"train_tokenizer.vocab_size={vocab_size}: a byte-level vocabulary needs {SMALLEST_VOCAB}")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if (size := backend.get_vocab_size()) != vocab_size:
        raise UserError(
            f"train_tokenizer.vocab_size={vocab_size}: the corpus yields only {size} tokens; add text or ask for fewer"
        )
    output.mkdir(parents=True, exist_ok=True)
    specials = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **specials}
    backend.save(str(output / "tokenizer.json"))
    for name, values in (("tokenizer_config.json", config), ("special_tokens_map.json", specials)):
        (output / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(output)
