"""Which repairs of a cut help: the quickstart's chain, shorter: one teacher, a student for each repair and seed.

    python benchmarks/repairs.py [--pretrain 200] [--distill 40] [--seeds 3] [--folder runs/repairs]

A teacher of the quickstart's shape is trained once. For every seed (which draws the calibration samples and orders the
distillation data) importance is estimated, the teacher is cut in all three width axes with each repair, and every
student is distilled for the same steps. The table has the cross-entropy and the forward KL from the teacher on held-out
text, right after the cut and after the distillation: the mean over the seeds, and in brackets the mean and the extremes
of the difference from the student without repairs under the same seed. A run that was stopped goes on when it is called
again with the same folder.
"""

import argparse
import json
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes.pipeline import main as run_pipeline

VARIANTS = {
    "none": {},
    "head_residual=plus": {"head_residual": "plus"},
    "head_residual=minus": {"head_residual": "minus"},
    "norm_scale": {"norm_scale": True},
    "projections": {"projections": True},
    "residual_stream": {"residual_stream": True},
    "all least squares + norm_scale": {"norm_scale": True, "projections": True, "residual_stream": True},
}
TARGET = {"hidden_size": 96, "ffn_hidden_size": 256, "num_attention_heads": 2}
BATCH, SEQ_LENGTH = 4, 128
SEED = 100  # of the first student
CONFIG = {
    "defaults": ["schema", "_self_"],
    "name": "repairs",
    "model": {
        "num_layers": 6, "hidden_size": 128, "ffn_hidden_size": 384, "num_attention_heads": 4, "num_query_groups": 2,
        "kv_channels": 32, "vocab_size": 2048, "seq_length": 512,
    },
    "trainer": {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 20},
    "train_tokenizer": {"vocab_size": 2048},
    "random_init": {"init_method_std": 0.08},
    "data": {"seq_length": SEQ_LENGTH, "split": "95,5,0", "blend": {"prose": 1.0}},
    "estimate_importance": {"num_samples": 32, "micro_batch_size": 16, "second_moments": True},
    "prune": {"target": TARGET},
    "evaluate": {"num_samples": 32, "micro_batch_size": 16},
}  # fmt: skip


def training(steps: int, lr: float) -> dict:
    return {
        "max_steps": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH, "val_check_interval": 0,
        "save_every_n_steps": 0, "optim": {"lr": lr, "min_lr": lr / 10, "warmup_steps": 10},
    }  # fmt: skip


def step(recipe: str, *overrides: str) -> dict:
    return {"recipe": recipe, "overrides": list(overrides)}


def student(variant: str, seed: int) -> str:
    return f"seed{seed}_{list(VARIANTS).index(variant)}"


def config(folder: Path, options: argparse.Namespace) -> dict:
    run = str(folder)
    steps = [
        step("train_tokenizer"),
        step("prepare_data"),
        step("random_init"),
        step("correct_teacher", f"correct_teacher.checkpoint={run}/random_init.nemo"),
        step("evaluate", f"evaluate.checkpoint={run}/corrected_teacher.nemo"),
    ]
    trained_steps = []
    for seed in range(SEED, SEED + options.seeds):
        scores = f"{run}/importance_{seed}"
        steps.append(step("estimate_importance", f"seed={seed}", f"estimate_importance.output={scores}"))
        for variant, repairs in VARIANTS.items():
            name = student(variant, seed)
            cut, trained = f"{run}/{name}_cut.nemo", f"{run}/{name}.nemo"
            set_repairs = [f"prune.repairs.{key}={value}" for key, value in repairs.items()]
            steps += [
                step("prune", f"prune.importance={scores}", f"prune.output={cut}", *set_repairs),
                step("evaluate", f"evaluate.checkpoint={cut}"),
            ]
            trained_steps += [
                step("distill", f"seed={seed}", f"distill.checkpoint={cut}", f"distill.output={trained}"),
                step("evaluate", f"evaluate.checkpoint={trained}"),
            ]
    text = {"prose": {"input": "stdlib", "glob": "**/*.py", "docstrings_only": True}}
    return CONFIG | {
        "run_dir": run,
        "prepare_data": {"tokenizer": f"{run}/tokenizer", "corpora": text},
        "correct_teacher": {"training": training(options.pretrain, 3e-3)},
        "distill": {"training": training(options.distill, 2e-3)},
        "pipeline": {"steps": steps + trained_steps},
    }


def measured(folder: Path, name: str, key: str) -> float:
    return json.loads((folder / "eval" / f"{name}.json").read_text())[key]


def cell(folder: Path, variant: str, *, seeds: range, after: str, key: str) -> str:
    """`4.512 (-0.120, -0.131..-0.104)`"""
    values = [measured(folder, student(variant, seed) + after, key) for seed in seeds]
    text = f"{mean(values):.3f}"
    if variant == "none":
        return text
    rest = [
        value - measured(folder, student("none", seed) + after, key) for value, seed in zip(values, seeds, strict=True)
    ]
    return f"{text} ({mean(rest):+.3f}, {min(rest):+.3f}..{max(rest):+.3f})"


def table(folder: Path, options: argparse.Namespace) -> None:
    print(f"{date.today()}, {platform.machine()} CPU, Python {platform.python_version()}, torch {version('torch')}, "
          f"megatron-core {version('megatron-core')}")  # fmt: skip
    sizes = ", ".join(f"{axis} {CONFIG['model'][axis]} -> {size}" for axis, size in TARGET.items())
    print(f"{sizes}; teacher {options.pretrain} steps, students {options.distill} steps of {BATCH} x {SEQ_LENGTH} "
          f"tokens; {options.seeds} seeds; evaluated on {CONFIG['evaluate']['num_samples']} samples")  # fmt: skip
    print(f"teacher: cross-entropy {measured(folder, 'corrected_teacher', 'cross_entropy'):.3f}")
    for key in ("cross_entropy", "forward_kl"):
        print(f"\n| {key} | after the cut | after distillation |\n|---|---|---|")
        for variant in VARIANTS:
            cells = [
                cell(folder, variant, seeds=range(SEED, SEED + options.seeds), after=after, key=key)
                for after in ("_cut", "")
            ]
            print(f"| {variant} | {cells[0]} | {cells[1]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=int, default=200, help="steps of the teacher")
    parser.add_argument("--distill", type=int, default=40, help="steps of each student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/repairs"))
    options = parser.parse_args()
    folder = options.folder.resolve()
    (folder / "conf").mkdir(parents=True, exist_ok=True)
    # JSON is YAML.
    (folder / "conf" / "repairs.yaml").write_text(json.dumps(config(folder, options), indent=1))
    if code := run_pipeline(["--config-name", "repairs", "--config-dir", str(folder / "conf")]):
        sys.exit(code)
    table(folder, options)


if __name__ == "__main__":
    main()
