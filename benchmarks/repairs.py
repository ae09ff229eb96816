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
from pathlib import Path

from small_teacher import CONFIG, TEACHER, cell, heading, make, measured, step, training

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
EVALUATED = 32  # samples


def student(variant: str, seed: int) -> str:
    return f"seed{seed}_{list(VARIANTS).index(variant)}"


def chain(run: str, seeds: range) -> list[dict]:
    """Every cut of every seed, evaluated; then every student."""
    steps, trained_steps = [], []
    for seed in seeds:
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
    return steps + trained_steps


def table(folder: Path, options: argparse.Namespace, seeds: range) -> None:
    print(heading())
    sizes = ", ".join(f"{axis} {CONFIG['model'][axis]} -> {size}" for axis, size in TARGET.items())
    print(f"{sizes}; teacher {options.pretrain} steps, students {options.distill} steps of {BATCH} x {SEQ_LENGTH} "
          f"tokens; {options.seeds} seeds; evaluated on {EVALUATED} samples")  # fmt: skip
    print(f"teacher: cross-entropy {measured(folder, TEACHER, 'cross_entropy'):.3f}")
    for key in ("cross_entropy", "forward_kl"):
        print(f"\n| {key} | after the cut | after distillation |\n|---|---|---|")
        for variant in VARIANTS:
            cells = []
            for after in ("_cut", ""):
                values, plain = (
                    [measured(folder, student(name, seed) + after, key) for seed in seeds] for name in (variant, "none")
                )
                cells.append(cell(values, None if variant == "none" else plain))
            print(f"| {variant} | {cells[0]} | {cells[1]} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=int, default=200, help="steps of the teacher")
    parser.add_argument("--distill", type=int, default=40, help="steps of each student")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/repairs"))
    options = parser.parse_args()
    folder, seeds = options.folder.resolve(), range(SEED, SEED + options.seeds)
    make(
        "repairs",
        folder,
        pretrain=training(options.pretrain, lr=3e-3, batch=BATCH),
        data={"seq_length": SEQ_LENGTH},
        sections={
            "estimate_importance": {"num_samples": 32, "micro_batch_size": 16, "second_moments": True},
            "prune": {"target": TARGET},
            "distill": {"training": training(options.distill, lr=2e-3, batch=BATCH)},
            "evaluate": {"num_samples": EVALUATED, "micro_batch_size": 16},
        },
        then=chain(str(folder), seeds),
        texts=folder,
    )
    table(folder, options, seeds)


if __name__ == "__main__":
    main()
