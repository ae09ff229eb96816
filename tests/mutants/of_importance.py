"""Faults in the sums that importance follows from, how they are kept, added up and compared, and in its criteria."""

from mutants.fault import Fault

SUMS = "minitron_nemo/importance/sums.py"
ESTIMATE = "minitron_nemo/steps/estimate.py"
KEPT = "minitron_nemo/steps/kept_sums.py"
CRITERIA = "minitron_nemo/importance/criteria.py"
SITES = "minitron_nemo/importance/sites.py"
GRADIENTS = "minitron_nemo/importance/gradient_sites.py"
TEST_FORMULAS = "tests/distributed/test_criteria.py -k formula"
TEST_LAYOUTS = "tests/distributed/test_criteria.py -k 'every_layout and {}'"
TEST_SUMS = "tests/unit/test_sums.py"
MOMENTS = "minitron_nemo/importance/second_moments.py"
ACCUMULATORS = "minitron_nemo/importance/accumulators.py"
FOLDERS = "minitron_nemo/steps/score_folders.py"
TEST_RECIPES = "tests/recipes/test_importance_recipes.py"
TEST_RESUME = "tests/distributed/test_importance_resume.py"

FAULTS = [
    Fault(
        "minitron_nemo/steps/estimate.py",
        "in importance every data-parallel rank does share 0",
        find="groups.layout.share_of(stretch, groups.dp_rank)",
        replace="groups.layout.share_of(stretch, 0)",
        tests="tests/distributed/test_cover.py -k importance",
    ),
    Fault(
        SUMS,
        "samples that two jobs heard count twice",
        find="if (low := max(a.first, b.first)) < (high := min(a.end, b.end)):",
        replace="if (low := max(a.first, b.first)) > (high := min(a.end, b.end)) + 10**9:",
        tests=TEST_SUMS,
    ),
    Fault(
        SUMS,
        "sums of another model add up",
        find='    yield "model", a.heard.model, b.heard.model\n',
        replace="",
        tests=TEST_SUMS,
    ),
    Fault(
        SUMS,
        "sums for another criterion add up",
        find="a.names.get(axis), b.names.get(axis)",
        replace="None, None",
        tests=TEST_SUMS,
    ),
    Fault(
        SUMS,
        "the sums of a part replace those before",
        find="tuple(mine + theirs for mine, theirs",
        replace="tuple(theirs for mine, theirs",
        tests=TEST_SUMS,
    ),
    Fault(
        SUMS,
        "cuts depend on where a job begins",
        find="{*range(0, samples.stop, at_most)",
        replace="{*range(samples.start, samples.stop, at_most)",
        tests=TEST_SUMS,
    ),
    Fault(
        SUMS,
        "sums that are not finite are read",
        find="if not torch.isfinite(table).all():",
        replace="if False:",
        tests=TEST_SUMS,
    ),
    Fault(
        ESTIMATE,
        "a run that goes on hears its first samples again",
        find="left = samples[sums.num_samples :]",
        replace="left = samples",
        tests=TEST_RESUME,
    ),
    Fault(
        ESTIMATE,
        "samples that make no whole micro-batch are dropped",
        find="(samples[whole:], len(samples) - whole)",
        replace="(samples[whole:whole], 1)",
        tests=TEST_RESUME,
    ),
    Fault(
        KEPT,
        "sums of another estimate are gone on from",
        find="if manifest.fingerprint == self.fingerprint:",
        replace="if True:",
        tests="tests/unit/test_rounds.py",
    ),
    Fault(
        KEPT,
        "sums of one part are those of another whose name begins alike",
        find='f"{glob.escape(self.part)}_" + "[0-9]" * DIGITS',
        replace='f"{self.part}_*"',
        tests="tests/unit/test_rounds.py -k apart",
    ),
    Fault(
        MOMENTS,
        "a run that goes on forgets the tokens of its second moments",
        find="int(file.tokens))",
        replace="0)",
        tests=TEST_RESUME,
    ),
    Fault(
        MOMENTS,
        "every tensor-parallel rank goes on from the units of the first",
        find="first = width * self.groups.tp_rank if shards else 0",
        replace="first = 0",
        tests=f"{TEST_RESUME} -k another_layout",
    ),
    Fault(
        ACCUMULATORS,
        "every slice of a sequence begins with the whole second moments",
        find="if self.groups.dp_rank > 0 or self.groups.cp_rank > 0 or (slices and self.groups.tp_rank > 0):",
        replace="if self.groups.dp_rank > 0 or self.groups.cp_rank > 0:",
        tests=f"{TEST_RESUME} -k another_layout",
    ),
    Fault(
        ACCUMULATORS,
        "every data-parallel rank begins with the whole second moments",
        find="if self.groups.dp_rank > 0 or self.groups.cp_rank > 0 or (slices and self.groups.tp_rank > 0):",
        replace="if self.groups.cp_rank > 0 or (slices and self.groups.tp_rank > 0):",
        tests=f"{TEST_RESUME} -k newest",
    ),
    Fault(
        ESTIMATE,
        "second moments are kept in float32",
        find="partial(found.write_sums, dtype=torch.float64)",
        replace="partial(found.write_sums, dtype=torch.float32)",
        tests=f"{TEST_RESUME} -k 'newest or asked'",
    ),
    Fault(
        MOMENTS,
        "of several jobs the second moments of the first are taken",
        find="total += other.read(name)",
        replace="total += 0 * other.read(name)",
        tests=TEST_RECIPES,
    ),
    Fault(
        FOLDERS,
        "the text of any job is taken for the beginning of the set",
        find="earliest = min(folders, key=",
        replace="earliest = max(folders, key=",
        tests=TEST_RECIPES,
    ),
    Fault(
        FOLDERS,
        "second moments of some jobs pass for those of all",
        find="if missing := [folder for folder in folders if folder not in there]:",
        replace="if (missing := [folder for folder in folders if folder not in there]) and not there:",
        tests=TEST_RECIPES,
    ),
    Fault(
        CRITERIA,
        "layers are normalised after they are added",
        find="weighed.append(torch.where(mean_L1 > 0, scores_LU / mean_L1, 0.0).sum(dim=0))",
        replace="weighed.append(scores_LU.sum(dim=0) / mean_L1.sum())",
        tests=TEST_FORMULAS,
    ),
    Fault(
        CRITERIA,
        "channels of a head are added and not squared",
        find="unflatten(-1, (count(arch), -1)).norm(dim=-1)",
        replace="unflatten(-1, (count(arch), -1)).sum(dim=-1)",
        tests=TEST_FORMULAS,
    ),
    Fault(
        SITES,
        "the up half stands for the gate",
        find="x_SBF.chunk(2, dim=-1)[0]",
        replace="x_SBF.chunk(2, dim=-1)[1]",
        tests=TEST_FORMULAS,
    ),
    Fault(
        SITES,
        "a query group is as long as one of its heads",
        find="head_norms(x_SBC, arch.heads_per_group * arch.kv_channels)",
        replace="head_norms(x_SBC, arch.kv_channels)[..., :: arch.heads_per_group]",
        tests=TEST_FORMULAS,
    ),
    Fault(
        SITES,
        "the final norm is one for each slice of the sequence",
        find="Spread.REPLICATED, Spread.PARTIAL, once=True)",
        replace="Spread.REPLICATED, Spread.REPLICATED, once=True)",
        tests=TEST_LAYOUTS.format("tp2_sp"),
    ),
    Fault(
        GRADIENTS,
        "a layer's gradient weighs its output and not what it adds",
        find="_float32(after) - _float32(before)",
        replace="_float32(after)",
        tests=TEST_FORMULAS,
    ),
    Fault(
        "minitron_nemo/importance/accumulators.py",
        "changes of opposite sign do not cancel over the tokens",
        find="x_SBU.sum(dim=0, dtype=torch.float64)",
        replace="x_SBU.abs().sum(dim=0, dtype=torch.float64)",
        tests=TEST_FORMULAS,
    ),
    Fault(
        ESTIMATE,
        "the last token of a sample is told to predict the first",
        find="mask[:, -1] = 0.0",
        replace="pass",
        tests=TEST_FORMULAS,
    ),
    Fault(
        "minitron_nemo/reporting/overlap.py",
        "the overlap is the share of all units in common",
        find="len(mine & other) / len(mine)",
        replace="len(mine & other) / len(mine | other)",
        tests="tests/unit/test_overlap.py",
    ),
]
