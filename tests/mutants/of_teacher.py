"""Faults in a teacher whose layout is its own."""

from mutants.fault import Fault

BESIDE = "minitron_nemo/distributed/beside.py"
LAYERS = "minitron_nemo/distillation/layers_on_demand.py"
SHARING = "minitron_nemo/distillation/sharing.py"
MEMORY = "minitron_nemo/steps/teacher_memory.py"
GROUPS = "tests/unit/test_beside.py"
ALONE = "tests/unit/test_layers_on_demand.py"
ON_RANKS = "tests/distributed/test_teacher_layouts.py -x"

FAULTS = [
    Fault(
        BESIDE,
        "the parts of a teacher's layer are not in the order of the ranks that have them",
        find="place.dp % self.replicas * self.student.tp + place.tp, place.dp",
        replace="place.tp * self.replicas + place.dp % self.replicas, place.dp",
        tests=f"{GROUPS} -k order_of_what_they_hold",
    ),
    Fault(
        BESIDE,
        "a copy of the teacher takes every so many-th rank of the student's",
        find="place.tp % self.teacher.tp, place.dp * self.copies + place.tp // self.teacher.tp",
        replace="place.tp // self.copies, place.dp * self.copies + place.tp % self.copies",
        tests=f"{GROUPS} -k exchange",
    ),
    Fault(
        BESIDE,
        "replicas exchange tokens with others than those that share their copy",
        find="(own.tp, own.cp, own.dp // self.replicas, own.pp)",
        replace="(own.tp, own.cp, own.dp % (self.student.dp // self.replicas), own.pp)",
        tests=f"{GROUPS} -k exchange",
    ),
    Fault(
        BESIDE,
        "a copy of the teacher spans replicas that there are not",
        find="if larger % smaller or (student.tp * student.dp) % tp:",
        replace="if larger % smaller:",
        tests=f"{GROUPS} -k overlap_in_part",
    ),
    Fault(
        BESIDE,
        "a whole teacher beside a split student thinks that its sequences are in slices",
        find="sequence_parallel=student.sequence_parallel and tp > 1",
        replace="sequence_parallel=student.sequence_parallel",
        tests=f"{GROUPS} -k has_the_ranks",
    ),
    Fault(
        "minitron_nemo/config/teacher.py",
        "weights are shared out where nobody shares them",
        find="if self.shard_weights and teacher.batch_ranks == 1:",
        replace="if False:",
        tests=f"{GROUPS} -k setting_of_its_own",
    ),
    Fault(
        "minitron_nemo/config/rules.py",
        "a teacher that cannot be laid out is found on the ranks",
        find="how.check(layout, seq_length=config.data.seq_length)",
        replace="pass",
        tests=f"{GROUPS} -k setting_of_its_own",
    ),
    Fault(
        "minitron_nemo/config/rules.py",
        "states inside of a teacher are compared in another split than the student's",
        find="if own_degree != layout.tp and",
        replace="if False and",
        tests=f"{GROUPS} -k setting_of_its_own",
    ),
    Fault(
        "minitron_nemo/config/rules.py",
        "replicas that ask other teachers wait for each other's weights",
        find="if how.shard_weights or own_degree > layout.tp:",
        replace="if own_degree > layout.tp:",
        tests=f"{GROUPS} -k setting_of_its_own",
    ),
    Fault(
        "minitron_nemo/steps/distillation.py",
        "a teacher is laid out as the student, whatever is asked for",
        find="options, section.teacher_parallel)",
        replace="options)",
        tests="tests/recipes/test_chain.py -k log_in_the_run_folder",
    ),
    Fault(
        "minitron_nemo/distributed/flat.py",
        "parameters of a flat layer lie against each other",
        find="end += math.ceil(size / unit) * unit",
        replace="end += size",
        tests=f"{ALONE} -k flat",
    ),
    Fault(
        LAYERS,
        "a layer that ran keeps its memory",
        find="        resting.empty()\n        self._free",
        replace="        self._free",
        tests=f"{ALONE} -k same_bits",
    ),
    Fault(
        LAYERS,
        "no layer is on its way while another runs",
        find="self._begin(chunk[number + 1 : number + 1 + self.how.ahead])",
        replace="self._begin([])",
        tests=f"{ALONE} -k on_its_way",
    ),
    Fault(
        LAYERS,
        "every rank keeps the first share of a layer",
        find="0 if self.how.group is None else self.how.group.rank()",
        replace="0",
        tests=ON_RANKS,
    ),
    Fault(
        SHARING,
        "a replica keeps what the teacher computed for the first of them",
        find="if replica == groups.number:",
        replace="if replica == 0:",
        tests=ON_RANKS,
    ),
    Fault(
        "minitron_nemo/engine/model.py",
        "a teacher's sequence is gathered from the student's ranks",
        find="hidden_states, tensor_parallel_output_grad=True, group=self.pg_collection.tp",
        replace="hidden_states, tensor_parallel_output_grad=True",
        tests=ON_RANKS,
    ),
    Fault(
        "minitron_nemo/engine/schedule.py",
        "stages send each other slices of a teacher's sequence as long as the student's",
        find="if (own := model.own_groups) is not None:",
        replace="if (own := None) is not None:",
        tests=ON_RANKS,
    ),
    Fault(
        "minitron_nemo/steps/traffic.py",
        "what the teacher runs for other replicas is not counted",
        find="math.ceil(self.microbatches / beside.copies) * beside.replicas",
        replace="math.ceil(self.microbatches / beside.copies)",
        tests=f"{ON_RANKS} -k crosses",
    ),
    Fault(
        MEMORY,
        "a head that is split as the student's is counted beside the teacher's own",
        find="(0 if is_tied else own.head_size())",
        replace="0",
        tests="tests/unit/test_forecast.py -k lies_elsewhere",
    ),
    Fault(
        MEMORY,
        "the layers that are on their way take no memory",
        find="min(how.prefetch_layers + 1, chunk)",
        replace="1",
        tests="tests/unit/test_forecast.py -k lies_elsewhere",
    ),
    Fault(
        "minitron_nemo/training/checkpoints.py",
        "a run with another teacher begins anew beside the one that it was meant to go on with",
        find="if theirs and theirs != ours:",
        replace="if False:",
        tests="tests/unit/test_training_checkpoints.py -k another_teacher",
    ),
    Fault(
        "minitron_nemo/training/checkpoints.py",
        "a training checkpoint does not say what teacher it learned from",
        find="origin=Origin(self.fingerprint, parents=self.parents, overwrite=True)",
        replace="origin=Origin(self.fingerprint, overwrite=True)",
        tests="tests/distributed/test_resume.py -k without_manifest",
    ),
]
