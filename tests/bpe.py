"""Small BPE tokenizers of the kinds that models have, for tests of what is done with their words."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SENTENCES = [
    "the model forgets what it was never asked to keep and a smaller one learns what remains of it again",
    "a thinner thing thinks that the other then gathers there, further than either of them ever did",
    "naïve café, Straße, 東京 and 42 % of £9.50; \t tabs\n\nand   runs of    spaces",
]
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
KINDS = ("byte_level", "all_splits", "byte_fallback")


def save_bpe(folder: Path, kind: str, *, size: int = 400) -> Path:
    """A tokenizer folder of `kind`: byte_level (as Llama-3's, special tokens last), all_splits (the same words, with
    every split of a word as a merge, as converted tokenizers have them), byte_fallback (as Mistral's, specials first).
    """
    content = _byte_fallback(size) if kind == "byte_fallback" else _byte_level(size)
    if kind == "all_splits":
        content["model"] |= {"merges": _every_split(content["model"]["vocab"]), "ignore_merges": True}
    backend = Tokenizer.from_str(json.dumps(content))
    ids = {name: backend.token_to_id(token) for name, token in SPECIAL.items()}
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", ids["bos_token"])]
    )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    named = {f"{name.removesuffix('_token')}_token_id": ident for name, ident in ids.items()}
    files = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL,
                                  "added_tokens_decoder": {str(i): {"content": SPECIAL[n]} for n, i in ids.items()}},
        "special_tokens_map.json": SPECIAL,
        "generation_config.json": {**named, "eos_token_id": [ids["eos_token"], ids["bos_token"]],
                                   "suppress_tokens": [ids["unk_token"], size - 10]},
    }  # fmt: skip
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    return folder


def _byte_level(size: int) -> dict:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - 3, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES * 3, trainer)
    backend.add_special_tokens(list(SPECIAL.values()))
    return json.loads(backend.to_str())


def _byte_fallback(size: int) -> dict:
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIAL.values(), *bytes_], show_progress=False, max_token_length=8
    )
    backend.train_from_iterator(SENTENCES[:1] * 2 + SENTENCES[1:], trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are words and not special
    return content


def _every_split(vocab: dict[str, int]) -> list[list[str]]:
    """Of every word all pairs of words that make it, by the rank of the word: what a list of ranks is turned into."""
    words = sorted(vocab, key=lambda word: vocab[word])
    splits = ((word[:at], word[at:]) for word in words for at in range(1, len(word)))
    return [[a, b] for a, b in splits if a in vocab and b in vocab]
