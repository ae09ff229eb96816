"""Faults in the loss on hidden states: where it is heard, who is told, what it adds up to."""

from mutants.fault import Fault

TAPS = "minitron_nemo/engine/taps.py"
TEACHER = "minitron_nemo/distillation/teacher.py"
HIDDEN = "minitron_nemo/training/hidden_states.py"
MAP = "minitron_nemo/training/state_map.py"
STEP = "minitron_nemo/steps/hidden_states.py"
LAYOUTS = "tests/distributed/test_hidden_states.py"
FORMULA = "tests/unit/test_hidden_state_loss.py"
PAIRS = "tests/unit/test_hidden_state_pairs.py"
ANCHOR = "tests/distributed/test_against_torch.py"

FAULTS = [
    Fault(
        TAPS,
        "a loss inside of the student has no gradient",
        find="torch.ones_like(loss)",
        replace="torch.zeros_like(loss)",
        tests=f"{ANCHOR} -k 'gradients and alone'",
    ),
    Fault(
        TEACHER,
        "the residual stream is added into the attention outputs that were heard",
        find="heard[tap].append(x_SBH.clone())",
        replace="heard[tap].append(x_SBH)",
        tests=f"{ANCHOR} -k 'gradients and alone'",
    ),
    Fault(
        HIDDEN,
        "the automatic weight forgets how the divergence is weighted",
        find="self.weight = self.head.scale * sums",
        replace="self.weight = sums",
        tests=f"{ANCHOR} -k 'steps and alone'",
    ),
    Fault(
        HIDDEN,
        "sequence-parallel ranks mask their tokens as the first does",
        find=".chunk(self.groups.layout.tp)[self.groups.tp_rank]",
        replace=".chunk(self.groups.layout.tp)[0]",
        tests=f"{LAYOUTS} -k tp2_sp_pp2",
    ),
    Fault(
        HIDDEN,
        "tensor-parallel ranks count the same tokens once each",
        find="values /= self.groups.layout.tp",
        replace="pass",
        tests=f"{LAYOUTS} -k 'tp2 and not pp2'",
    ),
    Fault(
        HIDDEN,
        "what is recomputed is added up twice",
        find="        if not is_again:\n",
        replace="        if True:\n",
        tests=f"{LAYOUTS} -k one_process",
    ),
    Fault(
        HIDDEN,
        "a recomputed layer is compared with the newest micro-batch that waits",
        find="self._again[tap].popleft()",
        replace="self._again[tap].pop()",
        tests=f"{LAYOUTS} -k pp2_vpp2",
    ),
    Fault(
        HIDDEN,
        "the loss in the log is that of the output heads alone",
        find="LOSS: sums[LOSS] + own",
        replace="LOSS: sums[LOSS]",
        tests=f"{LAYOUTS} -k minimized",
    ),
    Fault(
        HIDDEN,
        "a resumed run begins with no weight",
        find='self.weight = float(tensors["weight"])',
        replace="pass",
        tests=f"{LAYOUTS} -k one_process",
    ),
    Fault(
        MAP,
        "the map's gradient is counted on each tensor-parallel rank",
        find="copies = 1 if layout.sequence_parallel else layout.tp",
        replace="copies = 1",
        tests=f"{LAYOUTS} -k 'tp2 and not pp2'",
    ),
    Fault(
        MAP,
        "each rank trains a map of its own",
        find="if layout.world_size > 1:",
        replace="if False:",
        tests=f"{LAYOUTS} -k pp2_vpp2",
    ),
    Fault(
        "minitron_nemo/distributed/groups.py",
        "the sums of other stages than the last are lost",
        find="total = torch.stack(by_stage).sum(dim=0)",
        replace="total = by_stage[-1]",
        tests=f"{LAYOUTS} -k pp2_vpp2",
    ),
    Fault(
        "minitron_nemo/distributed/routes.py",
        "a stage's chunks are taken for neighbours",
        find="number % stages for number",
        replace="number * stages // len(chunks) for number",
        tests="tests/unit/test_routes.py -k every_stage",
    ),
    Fault(
        "minitron_nemo/losses/hidden_state.py",
        "the teacher's states are taken before the norm",
        find="self.teacher_norm(teacher_SBG)",
        replace="teacher_SBG.to(student_SBH.dtype)",
        tests=f"{FORMULA} -k value",
    ),
    Fault(
        STEP,
        "a student pruned in depth is compared as though its first layers were the teacher's",
        find="return [layer + 1 for layer in plan.layers]",
        replace="return list(range(1, student.arch.num_layers + 1))",
        tests=f"{PAIRS} -k plan_says",
    ),
    Fault(
        "minitron_nemo/training/objectives.py",
        "a run with other pairs goes on where this one stopped",
        find='if hidden is None else f"{self.head.in_words} + {hidden.in_words}"',
        replace="",
        tests=f"{PAIRS} -k in_words",
    ),
]
