"""Faults in blocks of layers: leaving them out, scoring, tasks, and what prune makes of it."""

from mutants.fault import Fault

REMOVAL = "minitron_nemo/engine/removal.py"
COSINE = "minitron_nemo/importance/block_cosine.py"
BLOCKS = "minitron_nemo/importance/blocks.py"
MEASURED = "minitron_nemo/evaluation/removal.py"
TASKS = "minitron_nemo/data/tasks.py"
STEP = "minitron_nemo/steps/score_blocks.py"
ROUNDS = "minitron_nemo/steps/rounds.py"
DEPTH = "minitron_nemo/steps/depth.py"
TEST_FOLDER = "tests/unit/test_blocks_folder.py"
TEST_TASKS = "tests/unit/test_tasks.py"
TEST_RECIPE = "tests/recipes/test_score_blocks.py"
MEASURED_IN = "tests/distributed/test_blocks.py -k 'every_measure and {}'"

FAULTS = [
    Fault(
        REMOVAL,
        "a block is one layer shorter than it says",
        find="self._layers[max(stop, 0) :]",
        replace="self._layers[max(stop - 1, 0) :]",
        tests=MEASURED_IN.format("alone"),
    ),
    Fault(
        REMOVAL,
        "later micro-batches go on from the states of the first",
        find="        self.states = []\n        layers =",
        replace="        layers =",
        tests=MEASURED_IN.format("alone"),
    ),
    Fault(
        REMOVAL,
        "stages after a block do not go on from what comes in",
        find="        if start < 0:  #",
        replace="        if start < -99:  #",
        tests=MEASURED_IN.format("pp2"),
    ),
    Fault(
        REMOVAL,
        "every block is run from the beginning",
        find="        return [_Resumed(self.states[min(start, len(self._layers))]), *layers]",
        replace="        return [*(_Evaluated(self, layer) for layer in self._layers[:start]), *layers]",
        tests="tests/distributed/test_blocks.py -k 'evaluated and alone'",
    ),
    Fault(
        REMOVAL,
        "the model stays cut after a pass",
        find="        finally:\n            self._decoder.layers = self._layers",
        replace="        finally:\n            self._decoder.training = False",
        tests="tests/distributed/test_blocks.py -k 'evaluated and alone'",
    ),
    Fault(
        COSINE,
        "the layers of every pipeline stage are counted from 0",
        find="self.first = sum(stages[: groups.pp_rank])",
        replace="self.first = 0",
        tests=MEASURED_IN.format("pp2"),
    ),
    Fault(
        COSINE,
        "one slice of a sequence stands for all",
        find="sums = merge(self.values, Spread.PARTIAL, self.groups.sequence)",
        replace="sums = self.values",
        tests=MEASURED_IN.format("tp2_sp"),
    ),
    Fault(
        COSINE,
        "a block ends before its last layer",
        find="states[stop - self.first])",
        replace="states[stop - 1 - self.first])",
        tests=MEASURED_IN.format("alone"),
    ),
    Fault(
        MEASURED,
        "the error is over the cut model's norm",
        find="norm += y.square_().sum()",
        replace="norm += x.square_().sum()",
        tests=MEASURED_IN.format("alone"),
    ),
    Fault(
        MEASURED,
        "the text of one data-parallel rank stands for all",
        find="return merge(merge(self.values, Spread.PARTIAL, self.groups.pp), Spread.PARTIAL, self.groups.dp)",
        replace="return merge(self.values, Spread.PARTIAL, self.groups.pp)",
        tests=MEASURED_IN.format("dp2"),
    ),
    Fault(
        MEASURED,
        "a token of a choice is asked of the place it stands at",
        find="hidden_SRH[end - len(request.continuation) : end, row]",
        replace="hidden_SRH[end - len(request.continuation) + 1 : end + 1, row]",
        tests=MEASURED_IN.format("alone"),
    ),
    Fault(
        ROUNDS,
        "every data-parallel rank scores the same choices",
        find="first = start + self.groups.dp_rank * size",
        replace="first = start",
        tests=MEASURED_IN.format("dp2"),
    ),
    Fault(
        STEP,
        "log-likelihoods come back in the order of their length",
        find="table_RV.values[numbers] =",
        replace="table_RV.values[list(places)] =",
        tests=MEASURED_IN.format("alone"),
    ),
    Fault(
        BLOCKS,
        "the block of lowest accuracy is dropped",
        find="-value if measure == TASK else value",
        replace="value",
        tests=TEST_FOLDER,
    ),
    Fault(
        BLOCKS,
        "the best block is counted from 0",
        find="list(range(start + 1, start + 1 + length))",
        replace="list(range(start, start + length))",
        tests=TEST_FOLDER,
    ),
    Fault(
        BLOCKS,
        "of equal blocks the lower goes",
        find="key=lambda place: (cost[place], -place)",
        replace="key=lambda place: (cost[place], place)",
        tests=TEST_FOLDER,
    ),
    Fault(TASKS, "acc_norm is acc", find="value / length for", replace="value for", tests=TEST_TASKS),
    Fault(TASKS, "no space before a choice", find='f" {choice}"', replace='f"{choice}"', tests=TEST_TASKS),
    Fault(TASKS, "answers are swapped", find="int(answer) - 1", replace="int(answer) % 2", tests=TEST_TASKS),
    Fault(
        TASKS,
        "a context is cut a token too short",
        find="room = seq_length + 1 - len(after)",
        replace="room = seq_length - len(after)",
        tests=TEST_TASKS,
    ),
    Fault(
        DEPTH,
        "the blocks of another model choose",
        find='    scores.check_source(arch, name=f"prune.blocks={folder}")\n',
        replace="",
        tests=f"{TEST_RECIPE} -k refused",
    ),
    Fault(
        DEPTH,
        "one block and single layers are swapped",
        find="scores.best_block if target.drop_contiguous else",
        replace="scores.best_block if not target.drop_contiguous else",
        tests=f"{TEST_RECIPE} -k alone",
    ),
    Fault(
        ROUNDS,
        "a stopped search begins again with its sums",
        find="range(done, count, size * self.groups.layout.dp)",
        replace="range(0, count, size * self.groups.layout.dp)",
        tests="tests/unit/test_rounds.py",
    ),
    Fault(
        ROUNDS,
        "the sums of another part of a search are gone on from",
        find="self.kept.of_part(part).newest(self.groups)",
        replace="self.kept.newest(self.groups)",
        tests="tests/unit/test_rounds.py",
    ),
    Fault(
        "minitron_nemo/steps/planning.py",
        "importance is asked for where blocks choose the layers",
        find="if target.drop_by or target.drop_layers else",
        replace="if target.drop_layers else",
        tests=f"{TEST_RECIPE} -k best_block",
    ),
    Fault(
        "minitron_nemo/steps/planning.py",
        "a budget that takes layers needs no importance",
        find="shrunk |= set(target.budget.axes)",
        replace="shrunk |= set()",
        tests=f"{TEST_RECIPE} -k asked_for",
    ),
    Fault(
        COSINE,
        "every slice of a sequence begins with the whole sums",
        find="first_slice = self.groups.sequence is None or self.groups.tp_rank == 0",
        replace="first_slice = True",
        tests="tests/distributed/test_blocks.py -k 'goes_on and tp2_sp'",
    ),
]
