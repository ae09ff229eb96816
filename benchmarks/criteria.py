"""Which criterion prunes better: the quickstart's model cut by every one of them, and what is lost right after the cut.

    python benchmarks/criteria.py [--pretrain 400] [--seeds 2] [--folder runs/criteria]

For every seed a teacher of the quickstart's shape is trained, from weights, batches and calibration samples of its own,
and cut without repairs or distillation: each axis alone by each of its criteria; hidden channels and neurons together,
the quickstart's width target, by criteria of activations and of gradients and by each pair of aggregations; and half of
the layers by importance, by what a search over blocks chooses, and in every way there is. `random` are scores drawn
three times. The tables have the cross-entropy on held-out text and the forward KL from the teacher: the mean over the
seeds, and in brackets the mean and the extremes of the difference from the first row. A run that was stopped goes on
when it is called again with the same folder.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from small_teacher import TEACHER, cell, heading, make, measured, training

from minitron_nemo.checkpoint.formats.nemo import NemoFolder, open_nemo
from minitron_nemo.config.compose import compose
from minitron_nemo.config.schema import Config
from minitron_nemo.data.calibration import calibration_set
from minitron_nemo.distributed.groups import Groups
from minitron_nemo.distributed.layout import Layout
from minitron_nemo.importance.blocks import COSINE, LM_LOSS, NMSE, BlockScores
from minitron_nemo.importance.criteria import names_of
from minitron_nemo.importance.estimators import AGGREGATIONS
from minitron_nemo.importance.scores import ImportanceScores, scores_of
from minitron_nemo.importance.sums import ImportanceSums
from minitron_nemo.pruning.cut import PrunedSource
from minitron_nemo.pruning.make_plan import make_plan
from minitron_nemo.shape.axes import AXES, shrink
from minitron_nemo.testing import run_layout

NAME = "criteria"
SEED = 100  # of the first teacher
BATCH, SEQ_LENGTH, CALIBRATION, EVALUATED = 4, 128, 128, 64
WIDTH = {"hidden_size": 96, "ffn_hidden_size": 256}
ALONE = {**WIDTH, "num_attention_heads": 2, "num_query_groups": 1}
LAYERS_LEFT = 3

KEYS = ("cross_entropy", "forward_kl")
RANDOM, DRAWS = "random", 3
FAMILIES = {"of activations": {}, "taylor": dict.fromkeys(WIDTH, "taylor"),
            "loss_change": dict.fromkeys(WIDTH, "loss_change")}  # fmt: skip

# table: row: key of KEYS: value
Results = dict[str, dict[str, dict[str, float]]]


class Cuts:
    """One teacher, its calibration samples, and what is left of it after a cut."""

    def __init__(self, config: Config, groups: Groups) -> None:
        from minitron_nemo.steps.options import build_options
        from minitron_nemo.steps.settings import blend_for

        self.model: NemoFolder = open_nemo(Path(config.run_dir) / f"{TEACHER}.nemo")
        self.blend = blend_for(config, self.model)
        self.options = build_options(config, groups)
        self.calibration = calibration_set(self.blend, num_samples=CALIBRATION)

    def sums(self, criteria: Mapping[str, str], sequence_aggregation: str = "mean") -> ImportanceSums:
        from minitron_nemo.steps.estimate import Estimate, estimate

        how = Estimate(criteria, sequence_aggregation, micro_batch_size=16)
        sums = estimate(self.model.weights, self.calibration, how, options=self.options).sums
        assert sums is not None
        return sums

    def lost(self, scores: ImportanceScores, sizes: Mapping[str, int], drop: Sequence[int] | None = None) -> dict:
        """The evaluation of what a plan from these scores leaves."""
        from minitron_nemo.steps.evaluate import evaluate_model

        plan = make_plan(scores, shrink(self.model.arch, **sizes), drop_layers=drop)
        found = evaluate_model(
            PrunedSource(self.model.weights, plan), self.model.weights, options=self.options, blend=self.blend,
            num_samples=EVALUATED, micro_batch_size=16,
        )  # fmt: skip
        return {key: getattr(found, key) for key in KEYS}

    def lost_at_random(self, scores: ImportanceScores, sizes: Mapping[str, int]) -> dict[str, float]:
        """The mean over cuts by random scores."""
        found = []
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(draw)
            drawn = {axis: torch.rand(x.shape, generator=generator).double() for axis, x in scores.by_axis.items()}
            found.append(self.lost(dataclasses.replace(scores, by_axis=drawn), sizes))
        return {key: mean(each[key] for each in found) for key in KEYS}

    def blocks(self) -> BlockScores:
        from minitron_nemo.steps.score_blocks import score_blocks

        lengths = (1, self.model.arch.num_layers - LAYERS_LEFT)
        return score_blocks(self.model.weights, self.calibration, options=self.options, lengths=lengths,
                            micro_batch_size=16)  # fmt: skip


def each_axis(cuts: Cuts) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Every criterion of every axis, the axis alone."""
    sizes = ALONE | {"num_layers": LAYERS_LEFT}
    passes = [{axis: names_of(axis)[number % len(names_of(axis))] for axis in AXES if names_of(axis)}
              for number in range(max(len(names_of(axis)) for axis in AXES))]  # fmt: skip
    done = set()
    for criteria in passes:
        scores = scores_of(cuts.sums(criteria), "l2")
        for axis, name in criteria.items():
            # Query groups take their heads along.
            cut = {axis: sizes[axis]} | ({"num_attention_heads": 2} if axis == "num_query_groups" else {})
            if (axis, name) not in done:
                done.add((axis, name))
                yield axis, name, cuts.lost(scores, cut)
        if criteria is passes[0]:
            for axis in criteria:
                cut = {axis: sizes[axis]} | ({"num_attention_heads": 2} if axis == "num_query_groups" else {})
                yield axis, RANDOM, cuts.lost_at_random(scores, cut)


def width(cuts: Cuts) -> Iterator[tuple[str, str, dict[str, float]]]:
    """The quickstart's width target, by criteria and aggregations."""
    for family, criteria in FAMILIES.items():
        for over_sequence in AGGREGATIONS:
            if family == "loss_change" and over_sequence != "mean":
                continue  # it sums over the sequence, whatever is asked
            sums = cuts.sums(criteria, over_sequence)
            for over_samples in AGGREGATIONS:
                how = f"{over_sequence}, {over_samples}"
                yield "width", f"{family}: {how}", cuts.lost(scores_of(sums, over_samples), WIDTH)
    yield "width", RANDOM, cuts.lost_at_random(scores_of(cuts.sums({}), "l2"), WIDTH)


def depth(cuts: Cuts) -> Iterator[tuple[str, str, dict[str, float]]]:
    """Half of the layers, by blocks and in every way there is."""
    blocks, scores = cuts.blocks(), scores_of(cuts.sums({}), "l2")
    sizes, total = {"num_layers": LAYERS_LEFT}, cuts.model.arch.num_layers
    every = {drop: cuts.lost(scores, sizes, drop) for drop in itertools.combinations(range(1, total + 1), LAYERS_LEFT)}
    for what, choose in (("block", blocks.best_block), ("one by one", blocks.best_layers)):
        for measure in (COSINE, LM_LOSS, NMSE):
            yield "depth", f"{what}, {measure}", every[tuple(choose(measure, total - LAYERS_LEFT))]
    by_loss = sorted(every.values(), key=lambda each: each[KEYS[0]])
    yield "depth", f"best of all {len(every)} ways", by_loss[0]
    yield "depth", "mean of all", {key: mean(each[key] for each in every.values()) for key in KEYS}


PARTS: dict[str, Callable[[Cuts], Iterator[tuple[str, str, dict[str, float]]]]] = {
    "axes": each_axis, "width": width, "depth": depth,
}  # fmt: skip


def measure(groups: Groups, config: Config, folder: str) -> None:
    """Fill in the files of one seed's results, one for each part."""
    cuts = None
    for part, rows in PARTS.items():
        path = Path(folder) / f"{part}.json"
        if path.is_file():
            continue
        cuts = cuts or Cuts(config, groups)
        results: Results = {}
        for table, row, values in rows(cuts):
            results.setdefault(table, {})[row] = values
            print(f"{Path(folder).name} {table} {row}: {values}", flush=True)
        path.write_text(json.dumps(results, indent=1))


def tables(folders: Sequence[Path], options: argparse.Namespace) -> None:
    print(heading())
    print(f"teachers {options.pretrain} steps of {BATCH} x {SEQ_LENGTH} tokens; {CALIBRATION} calibration samples, "
          f"{EVALUATED} evaluated; seeds {SEED}..{SEED + options.seeds - 1}")  # fmt: skip
    losses = ", ".join(f"{measured(folder, TEACHER, KEYS[0]):.3f}" for folder in folders)
    print(f"cross-entropy of the teachers: {losses}; each KL is from its own teacher")
    seeds: list[Results] = []
    for folder in folders:
        parts = (json.loads((folder / f"{part}.json").read_text()) for part in PARTS)
        seeds.append({table: rows for part in parts for table, rows in part.items()})
    for table, rows in seeds[0].items():
        print(f"\n| {table} | {' | '.join(KEYS)} |\n|---|---|---|")
        first, *_ = rows
        for row in rows:
            cells = []
            for key in KEYS:
                values, plain = ([seed[table][name][key] for seed in seeds] for name in (row, first))
                cells.append(cell(values, None if row == first else plain))
            print(f"| {row} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=int, default=400, help="steps of each teacher")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/criteria"))
    options = parser.parse_args()
    folders = [options.folder.resolve() / f"seed_{SEED + number}" for number in range(options.seeds)]
    for number, folder in enumerate(folders):
        make(
            NAME,
            folder,
            pretrain=training(options.pretrain, lr=3e-3, batch=BATCH),
            data={"seq_length": SEQ_LENGTH},
            sections={"seed": SEED + number, "evaluate": {"num_samples": EVALUATED, "micro_batch_size": 16}},
            texts=options.folder.resolve(),
        )
        run_layout(measure, Layout(), compose(NAME, config_dir=folder / "conf"), str(folder))
    tables(folders, options)


if __name__ == "__main__":
    main()
