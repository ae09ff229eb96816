"""Faults in importance, plans, cuts and packing."""

from mutants.fault import Fault

ESTIMATORS = "minitron_nemo/importance/estimators.py"
ACCUMULATORS = "minitron_nemo/importance/accumulators.py"
PACKING = "minitron_nemo/shape/packing.py"
MAKE_PLAN = "minitron_nemo/pruning/make_plan.py"
PLAIN = "minitron_nemo/pruning/plain_forward.py"
MASKED = "minitron_nemo/pruning/masked.py"
PROOF = "minitron_nemo/pruning/proof.py"
PLAIN_EQUALS = "tests/distributed/test_logits.py -k plain_forward"
RIGHT_CUT = "tests/unit/test_proof.py -k 'right_cut and all'"
TEST_ESTIMATORS = "tests/unit/test_estimators.py"
TEST_PACKING = "tests/unit/test_packing.py"
TEST_PLAN = "tests/unit/test_plan.py"
CUT = "minitron_nemo/pruning/cut.py"
LAWS = "tests/unit/test_laws.py"
SCORES_IN = "tests/distributed/test_importance_layouts.py -k 'scores_and_kept and {}'"

FAULTS = [
    Fault(
        ESTIMATORS,
        "the mean takes signed values",
        find="torch.abs(wide(), out=work).sum(dim=0)",
        replace="wide().sum(dim=0)",
        tests=TEST_ESTIMATORS,
    ),
    Fault(
        ESTIMATORS,
        "the variance is not taken around the mean",
        find=" - (total / count).square()",
        replace="",
        tests=TEST_ESTIMATORS,
    ),
    Fault(
        ESTIMATORS,
        "squares are taken about zero in float32",
        find="center = wide().mean(dim=0)",
        replace="center = 0 * wide().mean(dim=0)",
        tests=f"{TEST_ESTIMATORS} -k long_sequence",
    ),
    Fault(
        ESTIMATORS,
        "what a block's mean leaves over is forgotten",
        find="(2 * rest + len(x) * center)",
        replace="len(x) * center",
        tests=f"{TEST_ESTIMATORS} -k 'long_sequence or slices_add_up'",
    ),
    Fault(
        ESTIMATORS,
        "a block is the whole sequence",
        find="return max(16, min(BLOCK_ROWS, ",
        replace="return max(len(x), min(BLOCK_ROWS, ",
        tests=f"{TEST_ESTIMATORS} -k 'long_sequence or nothing_of_the_size'",
    ),
    Fault(
        ESTIMATORS,
        "sums that were not taken are zero",
        find="sums[unread] = torch.nan",
        replace="sums[unread] = 0",
        tests=f"{TEST_ESTIMATORS} -k are_nan",
    ),
    Fault(
        ESTIMATORS,
        "sums past the range of float32 stay infinite",
        find="return moments(s.to(torch.float64), of=of)",
        replace="pass",
        tests=f"{TEST_ESTIMATORS} -k overflow",
    ),
    Fault(
        ESTIMATORS,
        "the cosine is divided by one length",
        find="/ lengths[0] / lengths[1]",
        replace="/ lengths[0] / lengths[0]",
        tests=TEST_ESTIMATORS,
    ),
    Fault(
        ACCUMULATORS,
        "the sums that the mean reads are taken for every aggregation",
        find="of=self.sequence_aggregation",
        replace='of="mean"',
        tests="tests/unit/test_accumulators.py",
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
    Fault(
        PLAIN,
        "the plain forward pass rotates neighbours for halves",
        find="a, b, rest = x_BNSD.split((half, half, x_BNSD.shape[-1] - 2 * half), dim=-1)",
        replace="a, b, rest = x_BNSD[..., 0 : 2 * half : 2], x_BNSD[..., 1 : 2 * half : 2], x_BNSD[..., 2 * half :]",
        tests=PLAIN_EQUALS,
    ),
    Fault(
        PLAIN,
        "the plain forward pass takes up for gate",
        find="gate_BSF, up_BSF = first",
        replace="up_BSF, gate_BSF = first",
        tests=PLAIN_EQUALS,
    ),
    Fault(
        MASKED,
        "the masked norm divides by all channels",
        find="count = kept_H.sum()",
        replace="count = len(kept_H)",
        tests=RIGHT_CUT,
    ),
    Fault(
        MASKED,
        "the masked LayerNorm takes its mean over removed channels for zeros",
        find="centred_BSH = (x_BSH - mean_BS1) * kept_H",
        replace="centred_BSH = x_BSH - mean_BS1",
        tests=RIGHT_CUT,
    ),
    Fault(
        MASKED,
        "removed heads are not masked",
        find="heads_BSND.masked_fill(~heads_N[:, None], 0)",
        replace="heads_BSND",
        tests=RIGHT_CUT,
    ),
    Fault(
        MASKED,
        "masks of kept layers are those of the first layers",
        find="self.plan.layers.index(layer)",
        replace="min(layer, len(self.plan.layers) - 1)",
        tests=RIGHT_CUT,
    ),
    Fault(
        PROOF,
        "blocks are compared only through the logits",
        find="        if not off <= self.tolerance:\n",
        replace="        if False:\n",
        tests="tests/unit/test_proof.py -k wrong_cut_is_stopped",
    ),
    Fault(
        PROOF,
        "the student's own logits are those on the source's residual stream",
        find="statistics.add(done, theirs_BSV, own_BSV)",
        replace="statistics.add(done, theirs_BSV, same_input_BSV)",
        tests="tests/unit/test_proof.py -k two_whole_forward_passes",
    ),
    Fault(
        PROOF,
        "logits that are too far off pass",
        find="    if not logits.off <= tolerance:\n",
        replace="    if False:\n",
        tests="tests/unit/test_proof.py -k own_logits",
    ),
    Fault(
        PROOF,
        "the best word is counted within its piece",
        find="word = word + first",
        replace="word = word + 0",
        tests="tests/unit/test_proof.py -k logits_compared",
    ),
    Fault(
        "minitron_nemo/checkpoint/formats/nemo.py",
        "a model is proven from what was to be written",
        find="        if prove is not None:\n",
        replace="        if False:\n",
        tests="tests/unit/test_proof.py -k what_was_written",
    ),
    Fault(
        "minitron_nemo/pruning/plan.py",
        "a composed plan takes the first layers' units for those of the layers that stay",
        find="layers = second.layers if axis.per_layer",
        replace="layers = range(len(second.layers)) if axis.per_layer",
        tests=f"{LAWS} -k composed",
    ),
    Fault(
        PACKING,
        "a rank's up rows are taken from the gate's",
        find="side * half * tp + rank * half",
        replace="rank * half + side * 0",
        tests=f"{LAWS} -k layout",
    ),
    Fault(
        PACKING,
        "keys and values of a group that goes stay",
        find="keys = groups * blocks + arch.heads_per_group",
        replace="keys = _range(arch.num_query_groups) * blocks + arch.heads_per_group",
        tests=f"{LAWS} -k later",
    ),
    Fault(
        CUT,
        "a box is not looked at",
        find="box = whole(self.shape(name)) if box is None else box",
        replace="box = whole(self.shape(name))",
        tests=f"{LAWS} -k layout",
    ),
    Fault(
        CUT,
        "every block of rows is put at the beginning",
        find="result[first : first + len(rows)] =",
        replace="result[: len(rows)] =",
        tests="tests/unit/test_cuts.py -k blocks",
    ),
    Fault(
        CUT,
        "the source is read in one piece",
        find="_blocks(inside[0], BLOCK_BYTES // row_bytes)",
        replace="_blocks(inside[0], 2**40)",
        tests="tests/unit/test_cuts.py -k blocks",
    ),
    Fault(
        CUT,
        "what stays is taken for one run",
        find="int(kept[-1] - kept[0]) + 1 == len(kept):",
        replace="int(kept[-1] - kept[0]) + 1 >= len(kept):",
        tests="tests/unit/test_cuts.py",
    ),
    Fault(
        "minitron_nemo/checkpoint/source.py",
        "a stream gives the tensor that it reads ahead under the name before it",
        find="yield name, tensor",
        replace="yield name, waiting.result() if waiting else tensor",
        tests="tests/unit/test_cuts.py -k stream",
    ),
]
