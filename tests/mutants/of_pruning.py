"""Faults in importance, plans, cuts and packing."""

from mutants.fault import Fault

ESTIMATORS = "minitron_nemo/importance/estimators.py"
ACCUMULATORS = "minitron_nemo/importance/accumulators.py"
PACKING = "minitron_nemo/shape/packing.py"
MAKE_PLAN = "minitron_nemo/pruning/make_plan.py"
TEST_ESTIMATORS = "tests/unit/test_estimators.py"
TEST_PACKING = "tests/unit/test_packing.py"
TEST_PLAN = "tests/unit/test_plan.py"
SCORES_IN = "tests/distributed/test_importance_layouts.py -k 'scores_and_kept and {}'"

FAULTS = [
    Fault(
        ESTIMATORS,
        "the mean takes signed values",
        find="x.abs().sum(0)",
        replace="x.sum(0)",
        tests=TEST_ESTIMATORS,
    ),
    Fault(
        ESTIMATORS,
        "the variance is not taken around the mean",
        find=" - (total / count).square()",
        replace="",
        tests=TEST_ESTIMATORS,
    ),
    Fault(ESTIMATORS, "l2 without its root", find="sum_sq.sqrt()", replace="sum_sq", tests=TEST_ESTIMATORS),
    Fault(
        ESTIMATORS,
        "block importance upside down",
        find="1.0 - total / tokens",
        replace="total / tokens",
        tests=TEST_ESTIMATORS,
    ),
    Fault(
        ESTIMATORS,
        "heads are strided through the channels",
        find="x_SBC.unflatten(-1, (-1, kv_channels))",
        replace="x_SBC.unflatten(-1, (kv_channels, -1)).transpose(-1, -2)",
        tests=TEST_ESTIMATORS,
    ),
    Fault(
        "minitron_nemo/importance/criteria.py",
        "channels are heard at one of their two norms",
        find="(INPUT_NORM, PRE_MLP_NORM)",
        replace="(INPUT_NORM,)",
        tests="tests/unit/test_accumulators.py",
    ),
    Fault(
        ACCUMULATORS,
        "slices of a sequence are aggregated before they are added",
        find="m_MBU = merge(m_MBU, self.site.sequence, self.groups.sequence)",
        replace="pass",
        tests=SCORES_IN.format("tp2_sp"),
    ),
    Fault(
        ACCUMULATORS,
        "the statistics of one data-parallel rank stand for all",
        find="merge(merge(self.values, Spread.PARTIAL, self.groups.dp)",
        replace="merge(self.values",
        tests=SCORES_IN.format("dp2"),
    ),
    Fault(
        "minitron_nemo/importance/hooks.py",
        "the layers of every pipeline stage are counted from 0",
        find="[layer.layer_number - 1 for layer in layers]",
        replace="list(range(len(layers)))",
        tests=SCORES_IN.format("pp2 and not tp2"),
    ),
    Fault(
        "minitron_nemo/steps/estimate.py",
        "in importance every data-parallel rank does share 0",
        find="share.first_samples(groups.dp_rank)",
        replace="share.first_samples(0)",
        tests="tests/distributed/test_cover.py -k importance",
    ),
    Fault(MAKE_PLAN, "the worst units stay", find="descending=True", replace="descending=False", tests=TEST_PLAN),
    Fault(
        MAKE_PLAN,
        "neurons of kept layers are ranked by the scores of the first layers",
        find="scores[axis.name][list(layers)]",
        replace="scores[axis.name][: len(layers)]",
        tests=TEST_PLAN,
    ),
    Fault(
        MAKE_PLAN,
        "heads compete over all groups' places in the first group",
        find="block * held + unit for block in blocks for unit in top_units(units_BU[block], count)",
        replace="block * held + unit for block in blocks for unit in top_units(units_BU[0], count)",
        tests=TEST_PLAN,
    ),
    Fault(
        MAKE_PLAN,
        "layers to drop are counted from 0",
        find="layer + 1 not in drop_layers",
        replace="layer not in drop_layers",
        tests=TEST_PLAN,
    ),
    Fault(
        "minitron_nemo/pruning/plan.py",
        "a second cut forgets the first",
        find="_units_of(self.units(name, layer), row)",
        replace="row",
        tests=TEST_PLAN,
    ),
    Fault(
        "minitron_nemo/pruning/plan.py",
        "a plan is used on another checkpoint's shape",
        find="        if differing:\n            ours",
        replace="        if False:\n            ours",
        tests=TEST_PLAN,
    ),
    Fault(
        "minitron_nemo/pruning/cut.py",
        "kept layers are read from the first layers",
        find="self.plan.layers[tensor.layer]",
        replace="tensor.layer",
        tests="tests/unit/test_cuts.py",
    ),
    Fault(
        PACKING,
        "up rows are cut in the place of the target's",
        find="units + self._units(arch)",
        replace="units + len(units)",
        tests=TEST_PACKING,
    ),
    Fault(
        PACKING,
        "values are cut from the keys",
        find="torch.cat((queries, keys, keys + 1))",
        replace="torch.cat((queries, keys, keys))",
        tests=TEST_PACKING,
    ),
    Fault(
        PACKING,
        "a tensor-parallel rank takes gate rows for up rows",
        find="side * half * tp + rank * half",
        replace="side * half + rank * local_size",
        tests=TEST_PACKING,
    ),
    Fault(
        PACKING,
        "queries, keys and values are not packed by group",
        find="return torch.cat(grouped, dim=1).reshape",
        replace="return torch.cat([tensor.flatten(0, 1) for tensor in grouped]).reshape",
        tests=TEST_PACKING,
    ),
    Fault(
        "minitron_nemo/shape/axes.py",
        "an axis may grow",
        find="if not 1 <= size <= largest:",
        replace="if size < 1:",
        tests="tests/unit/test_axes.py",
    ),
]
