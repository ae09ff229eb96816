"""Faults in what watches over a run: sums by place and source, the check of the teacher, steps that are not finite."""

from mutants.fault import Fault

TALLIES = "minitron_nemo/losses/tallies.py"
HEAD = "minitron_nemo/losses/lm_head.py"
OBJECTIVES = "minitron_nemo/training/objectives.py"
CHECKS = "minitron_nemo/training/start_checks.py"
NON_FINITE = "minitron_nemo/training/non_finite.py"
LOOP = "minitron_nemo/training/loop.py"
STATE = "minitron_nemo/training/state.py"
TEST_TALLIES = "tests/unit/test_tallies.py"
TEST_STEP = "tests/distributed/test_several_teachers.py -k 'pytorch and alone'"
TEST_PARTS = "tests/distributed/test_several_teachers.py -k 'pytorch and cp2'"
TEST_POLICY = "tests/distributed/test_non_finite.py -k alone"
TEST_WORDS = "tests/unit/test_non_finite_words.py"
RIGHT_MODELS = "tests/recipes/test_right_models.py"

FAULTS = [
    Fault(
        TALLIES,
        "the last token of a part counts in the next",
        find="right=True)",
        replace="right=False)",
        tests=TEST_TALLIES,
    ),
    Fault(
        TALLIES,
        "places lie in the order of samples",
        find=".expand(places, samples).reshape(-1)",
        replace=".expand(places, samples).T.reshape(-1)",
        tests=TEST_TALLIES,
    ),
    Fault(
        TALLIES,
        "a token that is not finite spoils every bin",
        find="torch.where(inside_CN, values_QN[:, None, :], torch.zeros_like(values_QN[:, None, :])).sum(dim=2)",
        replace="(inside_CN * values_QN[:, None, :]).sum(dim=2)",
        tests=TEST_TALLIES,
    ),
    Fault(
        HEAD,
        "every chunk tallies by the bins of the first",
        find="inputs.bins_KN[:, turn.rows]",
        replace="inputs.bins_KN[:, : len(whole.lse)]",
        tests=TEST_TALLIES,
    ),
    Fault(
        OBJECTIVES,
        "a context-parallel rank takes its part for the beginning of the sample",
        find='head.tallies.sort(batch["positions"],',
        replace='head.tallies.sort(torch.arange(len(batch["positions"])),',
        tests=TEST_PARTS,
    ),
    Fault(
        OBJECTIVES,
        "what is of some tokens alone is divided by all",
        find="sums[of_bin(TOKENS, inside) if inside else TOKENS]",
        replace="sums[TOKENS]",
        tests=TEST_TALLIES,
    ),
    Fault(
        "minitron_nemo/data/datasets.py",
        "all samples are of the first source",
        find='int(sample.get("dataset_id", 0))',
        replace="0",
        tests=TEST_STEP,
    ),
    Fault(
        CHECKS,
        "a teacher that guesses worse than chance may teach",
        find="if not cross_entropy < chance:",
        replace="if cross_entropy != cross_entropy:",
        tests=f"{RIGHT_MODELS} -k worse_than_chance",
    ),
    Fault(
        CHECKS,
        "weights that are not finite or all zero may teach",
        find="        if wrong:",
        replace="        if False:",
        tests="tests/unit/test_start_checks.py",
    ),
    Fault(
        CHECKS,
        "the probe of a context-parallel rank has the labels of the sample's beginning",
        find="x[:, own_positions(x.shape[1], groups.cp).to(x.device)]",
        replace="x[:, : x.shape[1] // groups.layout.cp]",
        tests=TEST_PARTS,
    ),
    Fault(
        LOOP,
        "a step is stepped with whose teacher is not finite",
        find="_stop_or_skip(run, state, by_micro_batch, total=sums)",
        replace="position.advance(samples=run.config.global_batch_size, tokens=0 * bool(state.step()))",
        tests=TEST_POLICY,
    ),
    Fault(
        LOOP,
        "a run skips steps without end",
        find="if position.skipped_in_a_row >= allowed:",
        replace="if not allowed:",
        tests=TEST_POLICY,
    ),
    Fault(
        LOOP,
        "samples are those of the step before",
        find="_first_samples(run, position.consumed_samples)",
        replace="_first_samples(run, position.consumed_samples - config.global_batch_size)",
        tests=TEST_POLICY,
    ),
    Fault(
        STATE,
        "the schedule stands still in a skipped step",
        find="self.zero_gradients()\n        self.schedule.step(increment=1)",
        replace="self.zero_gradients()",
        tests=TEST_POLICY,
    ),
    Fault(
        STATE,
        "skipped steps leave no trace once one went well",
        find="self.skipped_steps += 1",
        replace="pass",
        tests=TEST_POLICY,
    ),
    Fault(
        NON_FINITE,
        "what is not finite in the teacher is laid to the student",
        find="student, teacher = CROSS_ENTROPY in names, TEACHER_ENTROPY in names",
        replace="teacher, student = CROSS_ENTROPY in names, TEACHER_ENTROPY in names",
        tests=TEST_WORDS,
    ),
    Fault(
        "minitron_nemo/data/sample_ids.py",
        "documents are those of the sample's number in the blend",
        find="int(dataset.dataset_sample_index[number])",
        replace="number",
        tests="tests/unit/test_blend.py -k stretch",
    ),
]
