"""What benchmarks cut: a teacher of the quickstart's shape, trained by the recipes themselves on docstrings."""

import json
import platform
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes.pipeline import main as run_pipeline

CONFIG: dict[str, Any] = {
    "defaults": ["schema", "_self_"],
    "model": {
        "num_layers": 6, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4, "num_query_groups": 2,
        "kv_channels": 32, "vocab_size": 2048, "seq_length": 512,
    },
    "trainer": {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 20},
    "train_tokenizer": {"vocab_size": 2048},
    "random_init": {"init_method_std": 0.08},
}  # fmt: skip
TEACHER = "corrected_teacher"


def step(recipe: str, *overrides: str) -> dict:
    return {"recipe": recipe, "overrides": list(overrides)}


def training(steps: int, *, lr: float, batch: int) -> dict:
    return {
        "max_steps": steps, "global_batch_size": batch, "micro_batch_size": batch, "val_check_interval": 0,
        "save_every_n_steps": 0, "optim": {"lr": lr, "min_lr": lr / 10, "warmup_steps": 10},
    }  # fmt: skip


def make(
    name: str, folder: Path, *, pretrain: dict, data: dict, sections: dict, then: Sequence[dict] = (), texts: Path
) -> None:
    """Train and evaluate a teacher in the run folder `folder`, then go through the steps `then`.

    `pretrain` is its training, `data` how the text is read, `sections` what else the config of this run says; tokenizer
    and tokens are those in `texts`. Leaves the config as `folder/conf/NAME.yaml`. What is there already is not made
    again. Ends the process when a step fails.
    """
    run = str(folder)
    begin = [
        step("train_tokenizer"),
        step("prepare_data"),
        step("random_init"),
        step("correct_teacher", f"correct_teacher.checkpoint={run}/random_init.nemo"),
        step("evaluate", f"evaluate.checkpoint={run}/{TEACHER}.nemo"),
    ]
    tokenizer = f"{texts}/tokenizer"
    text = {"prose": {"input": "stdlib", "glob": "**/*.py", "docstrings_only": True}}
    config = CONFIG | sections | {
        "name": name,
        "run_dir": run,
        "train_tokenizer": CONFIG["train_tokenizer"] | {"output": tokenizer},
        "prepare_data": {"tokenizer": tokenizer, "output": f"{texts}/data", "corpora": text},
        "random_init": CONFIG["random_init"] | {"tokenizer": tokenizer},
        "data": {"split": "95,5,0", "blend": {"prose": 1.0}} | data,
        "correct_teacher": {"training": pretrain},
        "pipeline": {"steps": [*begin, *then]},
    }  # fmt: skip
    (folder / "conf").mkdir(parents=True, exist_ok=True)
    # JSON is YAML.
    (folder / "conf" / f"{name}.yaml").write_text(json.dumps(config, indent=1))
    if code := run_pipeline(["--config-name", name, "--config-dir", str(folder / "conf")]):
        sys.exit(code)


def heading() -> str:
    return (
        f"{date.today()}, {platform.machine()} CPU, Python {platform.python_version()}, torch {version('torch')}, "
        f"megatron-core {version('megatron-core')}"
    )


def measured(folder: Path, name: str, key: str) -> float:
    """A number of an evaluation in a run folder."""
    return json.loads((folder / "eval" / f"{name}.json").read_text())[key]


def cell(values: Sequence[float], plain: Sequence[float] | None = None) -> str:
    """`4.512 (-0.120, -0.131..-0.104)`: the mean, and mean and extremes of the differences from `plain`."""
    if plain is None:
        return f"{mean(values):.3f}"
    rest = [value - other for value, other in zip(values, plain, strict=True)]
    return f"{mean(values):.3f} ({mean(rest):+.3f}, {min(rest):+.3f}..{max(rest):+.3f})"
