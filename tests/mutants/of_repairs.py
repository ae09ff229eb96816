"""Faults in repairs of a cut and in the second moments that they are made of."""

from mutants.fault import Fault

HEAD_RESIDUAL = "minitron_nemo/pruning/repairs/head_residual.py"
RESIDUAL = "minitron_nemo/pruning/repairs/residual.py"
SOURCES = "minitron_nemo/pruning/repairs/sources.py"
PROOF = "minitron_nemo/pruning/proof.py"
REPAIRS = "tests/unit/test_repairs.py"

FAULTS = [
    Fault(
        HEAD_RESIDUAL,
        "the strongest kept head takes from the strongest removed one",
        find="zip(reversed(stay), go, strict=False)",
        replace="zip(stay, go, strict=False)",
        tests=REPAIRS + " -k weakest_kept",
    ),
    Fault(
        HEAD_RESIDUAL,
        "heads are paired in their order and not by importance",
        find="key=lambda h: -float(repair.scores[AXIS][layer, h])",
        replace="key=lambda h: h",
        tests=REPAIRS + " -k weakest_kept",
    ),
    Fault(
        "minitron_nemo/pruning/repairs/least_squares.py",
        "the ridge pulls to zero and not to the cut",
        find="    wanted_OK = weight_OU[:, removed_R] @ gram_UU[removed_R][:, kept_K]\n"
        "    return weight_OU[:, kept_K] + ",
        replace="    wanted_OK = weight_OU @ gram_UU[:, kept_K]\n    return ",
        tests=REPAIRS + " -k 'never_loses or large_ridge'",
    ),
    Fault(
        "minitron_nemo/pruning/repairs/least_squares.py",
        "the ridge has no unit",
        find="ridge * scale *",
        replace="ridge *",
        tests=REPAIRS + " -k refitted_projections",
    ),
    Fault(
        RESIDUAL,
        "the energy of kept channels is a sum and not a mean",
        find="energy = kept_KK.diagonal().mean()",
        replace="energy = kept_KK.diagonal().sum() / len(self.means)",
        tests=REPAIRS + " -k scaled_norms",
    ),
    Fault(
        RESIDUAL,
        "the variance over kept channels is their mean square",
        find="energy = energy - kept_KK.mean()",
        replace="pass",
        tests=REPAIRS + " -k 'scaled_norms and nemotron'",
    ),
    Fault(
        RESIDUAL,
        "readers are refitted on what the norm gives without its bias",
        find=" + cross_HH + cross_HH.T + torch.outer(bias_H, bias_H)",
        replace="",
        tests=REPAIRS + " -k 'readers_of and nemotron'",
    ),
    Fault(
        SOURCES,
        "a repair takes the moments of the layer's place in the cut model",
        find="return None if tensor.layer is None else self.plan.layers[tensor.layer]",
        replace="return tensor.layer",
        tests=REPAIRS + " -k dropped_layers",
    ),
    Fault(
        SOURCES,
        "the scale of a LayerNorm1p forgets that its weight is stored minus one",
        find="return weight_K * scale - (1 if self.arch.has_norm_bias else 0)",
        replace="return weight_K * scale",
        tests=REPAIRS + " -k 'scaled_norms and nemotron'",
    ),
    Fault(
        "minitron_nemo/importance/accumulators.py",
        "a tensor-parallel rank knows only its own block of second moments",
        find="merge(x_SBu, self.site.units, self.groups.tp).flatten(0, 1)",
        replace="x_SBu.repeat(1, 1, self.values.shape[1] // x_SBu.shape[-1]).flatten(0, 1)",
        tests="tests/distributed/test_second_moments.py -k tp2_sp",
    ),
    Fault(
        "minitron_nemo/importance/accumulators.py",
        "slices of a sequence do not add up in second moments",
        find="values = self.whole_sequence(self.values)",
        replace="values = self.values",
        tests="tests/distributed/test_second_moments.py -k tp2_sp",
    ),
    Fault(
        PROOF,
        "a repaired tensor that was written wrongly is let pass",
        find="if _sha256(written.read(name)) != self.sha256.get(name):",
        replace="if False:",
        tests=REPAIRS + " -k published_with_its_proof",
    ),
]
