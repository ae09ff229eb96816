"""Tiny random Hugging Face models with a tokenizer, for tests."""

import json
from pathlib import Path
from typing import Any

import torch

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
TINY = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5, "rope_parameters": LLAMA3_ROPE},
    "mistral": {"rms_norm_eps": 1e-5, "sliding_window": None},
    "nemotron": {"norm_eps": 1e-5},
    "qwen2": {"rms_norm_eps": 1e-5},
    "qwen3": {"rms_norm_eps": 1e-5},
}


def save_tiny_hf(folder: str | Path, family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0,
                 tokenizer: bool = True, max_shard_size: str = "5GB", **overrides: Any) -> Path:  # fmt: skip
    """Save a tiny random model of `family` (a `model_type`) and its tokenizer; returns the folder.

    `overrides` are fields of the transformers config. Every weight is random, the norms' too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**TINY, **OF_FAMILY[family], **overrides})
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Llama's and Mistral's norms are near one; Nemotron stores them minus one.
            center = 1.0 if "norm" in name and family != "nemotron" else 0.0
            parameter.copy_(center + 0.1 * noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        save_tiny_tokenizer(folder, vocab_size=config.vocab_size)
    return Path(folder)


def save_tiny_tokenizer(folder: str | Path, *, vocab_size: int = 131) -> Path:
    """A word-level tokenizer with `vocab_size` words (`w0`, `w1`, ...), which AutoTokenizer opens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(vocab_size - 3))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return folder


def save_templated_tokenizer(folder: str | Path, template: str = "llama3") -> Path:
    """The tokenizer of `save_tiny_tokenizer` (`<s>` 1, `</s>` 2) with a post-processor.

    `template`: llama3 (in a sequence behind ByteLevel, as Llama-3's own file has it), mistral, or a template as text.
    """
    from tokenizers import Tokenizer, processors

    folder = save_tiny_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    named = template if "$A" in template else "<s> $A"
    processor = processors.TemplateProcessing(
        single=named, pair=f"{named} $B", special_tokens=[("<unk>", 0), ("<s>", 1), ("</s>", 2)]
    )
    if template == "llama3":
        processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), processor])
    tokenizer.post_processor = processor
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
