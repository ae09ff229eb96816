"""Training metrics: one flat record per logged step, to `metrics.jsonl` and TensorBoard."""

import json
import resource
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from minitron_nemo.artefacts.atomic import write_text_atomically
from minitron_nemo.artefacts.disk import writing
from minitron_nemo.losses.output import CROSS_ENTROPY, FORWARD_KL, LOSS, TOP1_AGREEMENT, bin_of

# How a person reads a metric, and its format; one without a line here goes by its own name.
IN_WORDS = {
    CROSS_ENTROPY: ("cross-entropy", ".4f"),
    FORWARD_KL: ("forward KL", ".4f"),
    TOP1_AGREEMENT: ("top-1 agreement", ".1%"),
}

# Dense bf16 peak, FLOP/s (vendor data sheets); models not listed get no share of peak.
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of this rank's device, None where unknown (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS.items() if known in name), None)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU, or the most that this process had in memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_words(means: Mapping[str, float]) -> str:
    """`cross-entropy 4.1300, forward KL 0.0680, top-1 agreement 82.4%`; without the loss, which is a mix of them, and
    without what is of some tokens alone.
    """
    shown = [name for name in means if name != LOSS and not bin_of(name)[1]]
    named = {name: IN_WORDS.get(name, (name.replace("_", " "), ".4g")) for name in shown}
    return ", ".join(f"{words} {means[name]:{form}}" for name, (words, form) in named.items())


class MetricsWriter:
    """Appends records to `metrics.jsonl`; a resumed run first drops the records after its step."""

    def __init__(self, folder: Path, *, resumed_step: int = 0, enabled: bool = True) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self.path = folder / "metrics.jsonl"
        with writing(self.path):
            self._open(folder, resumed_step)

    def _open(self, folder: Path, resumed_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if json.loads(line)["step"] <= resumed_step] if resumed_step else []
        if not resumed_step:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        write_text_atomically(self.path, "".join(f"{line}\n" for line in kept))
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step or None)

    def _lines(self) -> list[str]:
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return [line for line in lines if line.endswith("}")]  # a line cut by a kill is not a record

    def write(self, *, step: int, **values: float) -> None:
        if not self.enabled:
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.enabled:
            self.board.close()
