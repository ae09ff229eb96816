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

from minitron_nemo.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # the 256 bytes and END_OF_TEXT


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    No begin-of-text token is added: documents are separated by `eod` alone, as NeMo and Megatron prepare them.
    """

    folder: Path
    eod: int  # id that ends every document
    fingerprint: str  # sha256 of everything that decides which ids come out
    backend: tokenizers.Tokenizer = field(repr=False, compare=False)

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one; ids may have holes, so this is not the number of tokens."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; several times faster than one by one, as offsets into the text are not kept."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in `folder`: one with a tokenizer.json, or a .nemo folder that has it under tokenizer/.

    Raises UserError for a missing or unreadable tokenizer.json and when no end-of-document token is known.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer").is_dir():
        folder = folder / "tokenizer"
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "tokenizer.model").is_file():
            raise UserError(
                f"{folder}: has only tokenizer.model (sentencepiece); convert it to tokenizer.json with "
                "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        raise UserError(
            f"{folder}: no tokenizer.json; give a tokenizer folder (`python recipes/train_tokenizer.py` makes one) "
            "or a .nemo folder that has tokenizer/tokenizer.json"
        )
    content = _read_json(path)
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: the tokenizers library cannot open it: {error}") from None
    # A tokenizer.json may carry the truncation and padding of its last use: they would cut documents.
    backend.no_truncation()
    backend.no_padding()
    eod = _eod(folder, backend)
    decisive = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    text = json.dumps([decisive, eod], sort_keys=True, separators=(",", ":"))
    return Tokenizer(folder=folder, eod=eod, fingerprint=hashlib.sha256(text.encode()).hexdigest(), backend=backend)


def _eod(folder: Path, backend: tokenizers.Tokenizer) -> int:
    """Id of eos_token in tokenizer_config.json, else eos_token_id of the model's configuration."""
    if (path := folder / "tokenizer_config.json").is_file():
        token = _read_json(path).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            ident = backend.token_to_id(token)
            if ident is None:
                raise UserError(f"{path}: eos_token {token!r} is not in the vocabulary of tokenizer.json")
            return ident
    for name in ("generation_config.json", "config.json", "hf_config.json"):
        if (path := folder / name).is_file():
            ident = _read_json(path).get("eos_token_id")
            ident = ident[0] if isinstance(ident, list) and ident else ident
            if isinstance(ident, int):
                return ident
    raise UserError(
        f"{folder}: no end-of-document token; set eos_token in tokenizer_config.json (or eos_token_id in config.json)"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


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
