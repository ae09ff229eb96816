"""What a distillation step of the published configs sends, on 1, 8 and 32 nodes of 8 GPUs: arithmetic, no measurement.

    python benchmarks/scaling.py [--configs llama31_width ...] [--nodes 1 8 32]

`minitron_nemo/steps/traffic.py` counts the bytes, and tests/distributed/test_traffic.py compares it with what ranks
send. Seconds are bytes over the nominal speed of a link, overlapping with nothing; those of the work are its FLOPs at
the share of peak that the dry run assumes.
"""

import argparse
from collections import Counter

from minitron_nemo.config.compose import compose
from minitron_nemo.config.schema import Config
from minitron_nemo.errors import UserError
from minitron_nemo.steps.describe import shapes
from minitron_nemo.steps.forecast import PEAK_FLOPS, PEAK_SHARE
from minitron_nemo.steps.stages import Stages
from minitron_nemo.steps.traffic import Step, Traffic

CONFIGS = ["llama31_width", "llama31_depth", "mistral_nemo_width", "nemotron4_8b", "nemotron4_4b"]
GPUS = 8  # of a node
# Bytes a second that a GPU sends, from vendors' data sheets: NVLink 4 of an H100, and a 400 Gb/s adapter for each GPU.
NVLINK, NETWORK = 450e9, 50e9


def busiest(config: Config) -> Traffic:
    """What the pipeline stage that sends most sends in a step, student and teacher."""
    layout, model, training = config.layout, shapes(config), config.distill.training
    share = layout.share(training.global_batch_size, training.micro_batch_size)
    step = Step(
        tokens=training.micro_batch_size * config.data.seq_length,
        microbatches=share.num_microbatches,
        recompute=config.parallel.recompute,
        distributed_optimizer=config.parallel.use_distributed_optimizer,
    )
    student = Stages.of(model.student, layout, config.parallel.student_stage_layers)
    how = config.distill.teacher_parallel
    beside = how.beside(layout)
    teacher = Stages.of(model.teacher, beside.teacher, config.parallel.teacher_stage_layers)
    found = [
        step.of_student(student, stage, with_teacher=True)
        + step.of_teacher_beside(teacher, stage, beside=beside, shard_weights=how.shard_weights)
        for stage in range(layout.pp)
    ]
    return max(found, key=lambda traffic: sum(traffic.values()))


def work_seconds(config: Config) -> float:
    """Seconds of a step's FLOPs on every GPU."""
    model, seq = shapes(config), config.data.seq_length
    of_token = 3 * model.student.flops_per_token(seq) + model.teacher.flops_per_token(seq)
    tokens = config.distill.training.global_batch_size * seq
    return tokens * of_token / config.layout.world_size / (PEAK_SHARE * PEAK_FLOPS)


def row(name: str, nodes: int) -> str:
    config = compose(name, [f"trainer.num_nodes={nodes}", f"trainer.devices={GPUS}"])
    try:
        traffic = busiest(config)
    except UserError as error:
        return f"{name:<20}{nodes:>6}  {error}"
    by_group: Counter[str] = Counter()
    for (group, _), size in traffic.items():
        by_group[{"teacher_tp": "tp", "exchange": "tp", "copies": "batch"}.get(group, group)] += size
    layout = config.layout
    inside = layout.tp * layout.pp <= GPUS  # a copy of the model lies within a node, so its ranks talk over NVLink
    model = (by_group["tp"] + by_group["pp"]) / (NVLINK if inside else NETWORK)
    copies = by_group["batch"] / (NVLINK if nodes == 1 else NETWORK)
    degrees = f"{layout.tp} x {layout.pp} x {layout.dp}"
    sizes = "".join(f"{by_group[group] / 1e9:>9.2f}" for group in ("tp", "pp", "batch"))
    return f"{name:<20}{nodes:>6}{degrees:>14}{sizes}{model:>10.2f}{copies:>9.2f}{work_seconds(config):>9.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 8, 32])
    options = parser.parse_args()
    print(f"{'':<40}{'GB that a GPU sends':>27}{'seconds of a step':>28}")
    print(f"{'config':<20}{'nodes':>6}{'TP x PP x DP':>14}{'tensor':>9}{'pipeline':>9}{'data':>9}"
          f"{'model':>10}{'copies':>9}{'work':>9}")  # fmt: skip
    for name in options.configs:
        for nodes in options.nodes:
            print(row(name, nodes), flush=True)


if __name__ == "__main__":
    main()
