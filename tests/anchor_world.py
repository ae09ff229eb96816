"""What the tests against plain PyTorch share: tiny Hugging Face models, a corpus, and a run on ranks with them.

The text is of words of one token each, and the tokenizer's end token is 2. Samples get holes in their loss mask, so
that micro-batches differ in tokens.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hf_models import save_tiny_hf
from torch import Tensor
from torch.utils.data import Dataset

from minitron_nemo.artefacts.origin import Origin
from minitron_nemo.checkpoint.formats.hf import export_hf, import_hf, open_hf
from minitron_nemo.checkpoint.formats.nemo import NemoFolder, open_nemo
from minitron_nemo.checkpoint.source import stream
from minitron_nemo.config.schema import CorpusConfig
from minitron_nemo.data.blend import Blend
from minitron_nemo.data.datasets import build_datasets
from minitron_nemo.data.prepare import prepare_corpus
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.engine.model import HeadlessGPT

SEQ_LENGTH = 12
DOCUMENTS = 60
SHAPES: dict[str, dict[str, Any]] = {"student": {}, "teacher": {"hidden_size": 48, "num_hidden_layers": 3}}


@dataclass(frozen=True)
class World:
    """Folders by role: `hf` as transformers opens them, `nemo` as we do; and what both read."""

    hf: dict[str, Path]
    nemo: dict[str, Path]
    blend: Blend


def make_world(folder: Path) -> World:
    """A student and a teacher imported from Hugging Face folders, and a prepared corpus."""
    hf, nemo = {}, {}
    for seed, (role, shape) in enumerate(SHAPES.items()):
        hf[role] = save_tiny_hf(folder / f"{role}_hf", "llama", seed=seed, **shape)
        nemo[role] = folder / f"{role}.nemo"
        source = open_hf(hf[role])
        import_hf(source, nemo[role], tensors=stream(source.weights), origin=Origin(role))
    drawn = random.Random(3)
    texts = [" ".join(f"w{drawn.randrange(128)}" for _ in range(drawn.randint(20, 50))) for _ in range(DOCUMENTS)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text(lines)
    tokenizer = load_tokenizer(nemo["student"])
    corpus = CorpusConfig(input=str(folder / "text.jsonl"))
    prepare_corpus("text", corpus, tokenizer=tokenizer, output=folder / "data", show_progress=False)
    blend = Blend(
        {"text": 1.0}, prepared=folder / "data", cache=folder / "index", seq_length=SEQ_LENGTH, split="80,20,0", seed=5,
        tokenizer=tokenizer, vocab_size=131,
    )  # fmt: skip
    return World(hf, nemo, blend)


class WithHoles(Dataset):
    """A dataset whose sample i has a loss mask of its own; one whose number is a multiple of 5 keeps few tokens."""

    def __init__(self, dataset: Dataset, *, cut_at: int | None = None, poisoned: int | None = None) -> None:
        self.dataset, self.config = dataset, dataset.config  # type: ignore[attr-defined]
        self.cut_at = cut_at  # reading a sample from here on fails: what stops a run
        self.poisoned = poisoned  # the mask of this sample is not a number

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.cut_at is not None and index >= self.cut_at:
            raise PowerCutError
        sample = dict(self.dataset[index])
        kept = 0.2 if index % 5 == 0 else 0.8
        holes = torch.rand(SEQ_LENGTH, generator=torch.Generator().manual_seed(index)) < kept
        sample["loss_mask"] = sample["loss_mask"] * (torch.nan if index == self.poisoned else holes.float())
        return sample


class PowerCutError(Exception):
    """What stops a run half-way."""


def datasets_with_holes(
    blend: Blend, *, cut_at: int | None = None, poisoned: int | None = None, **counts: int
) -> tuple[Any, Any]:
    """As `build_datasets`, with the masks of `WithHoles`; reading training sample `cut_at` fails."""
    train, valid = build_datasets(blend, **counts)
    return (
        None if train is None else WithHoles(train, cut_at=cut_at, poisoned=poisoned),
        None if valid is None else WithHoles(valid),
    )


def rows(dataset: Any, numbers: range) -> dict[str, Tensor]:
    """Tokens, labels and loss mask of these samples, [b, s] each."""
    samples = [dataset[number] for number in numbers]
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask")}


def own_cache(blend: Blend, folder: Path) -> Blend:
    """The same blend with its indices elsewhere."""
    return replace(blend, cache=folder)


def as_hf(nemo: NemoFolder | Path, folder: Path) -> dict[str, Tensor]:
    """The weights of a model of ours under Hugging Face's names."""
    model = nemo if isinstance(nemo, NemoFolder) else open_nemo(nemo)
    export_hf(model, folder, origin=Origin("export"))
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def hear_tokens() -> list[tuple[int, list[list[int]], bool]]:
    """A list that grows by (hidden size, tokens [b, s], gradients wanted) with every forward pass of this process."""
    heard: list[tuple[int, list[list[int]], bool]] = []
    original = HeadlessGPT.forward

    def forward(self: HeadlessGPT, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        heard.append((self.config.hidden_size, input_ids.tolist(), torch.is_grad_enabled()))
        return original(self, input_ids, *args, **kwargs)

    HeadlessGPT.forward = forward
    return heard
