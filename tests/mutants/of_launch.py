"""Faults in who is which rank, and in the scripts that start recipes on clusters and in containers."""

from mutants.fault import Fault

RANKS = "minitron_nemo/distributed/ranks.py"
SLURM = "launch/slurm.sbatch"
PIPELINE = "launch/pipeline.sh"
DOCKER = "launch/docker.sh"
TEST_RANKS = "tests/unit/test_rank_environment.py"
TEST_LAUNCH = "tests/unit/test_launch.py"

FAULTS = [
    Fault(
        RANKS,
        "a batch script of Slurm takes itself for a rank",
        find=' and "SLURM_STEP_ID" in environment',
        replace="",
        tests=TEST_RANKS,
    ),
    Fault(
        RANKS,
        "a rank's device is that of its number over all nodes",
        find='int(environment["SLURM_LOCALID"])',
        replace='int(environment["SLURM_PROCID"])',
        tests=TEST_RANKS,
    ),
    Fault(
        RANKS,
        "torchrun's local rank is not read",
        find='int(environment.get("LOCAL_RANK", 0))',
        replace="0",
        tests=TEST_RANKS,
    ),
    Fault(
        "minitron_nemo/steps/on_ranks.py",
        "a world of another size than the config's trains",
        find="if rank.world_size != layout.world_size:",
        replace="if False:",
        tests=TEST_RANKS,
    ),
    Fault(
        "minitron_nemo/distributed/spread.py",
        "parts of ranks are not added",
        find="return functools.reduce(torch.add, pieces)",
        replace="return pieces[0]",
        tests="tests/distributed/test_merge.py",
    ),
    Fault(
        "minitron_nemo/distributed/groups.py",
        "what a rank shares is cut to the length of the first's",
        find="longest = max(int(size) for size in sizes)",
        replace="longest = int(sizes[0])",
        tests="tests/distributed/test_merge.py tests/distributed/test_share_json.py",
    ),
    Fault(
        SLURM,
        "jobs on one node meet at one port",
        find="MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 20000))",
        replace="MASTER_PORT=29500",
        tests=f"{TEST_LAUNCH} -k port",
    ),
    Fault(SLURM, "ranks meet at the last node", find="| head -n 1)", replace="| tail -n 1)", tests=TEST_LAUNCH),
    Fault(
        SLURM,
        "every node is told to have all ranks",
        find="trainer.devices=$((ranks / nodes))",
        replace="trainer.devices=$ranks",
        tests=TEST_LAUNCH,
    ),
    Fault(
        SLURM,
        "a failed rank leaves the others waiting",
        find="--kill-on-bad-exit=1",
        replace="--kill-on-bad-exit=0",
        tests=TEST_LAUNCH,
    ),
    Fault(
        SLURM,
        "what the user typed comes before what the script sets",
        find='step+=(${overrides[@]+"${overrides[@]}"} "$@")',
        replace='step+=("$@" ${overrides[@]+"${overrides[@]}"})',
        tests=TEST_LAUNCH,
    ),
    Fault(
        PIPELINE,
        "a step starts after one that failed",
        find="--dependency=afterok:$previous",
        replace="--dependency=afterany:$previous",
        tests=f"{TEST_LAUNCH} -k pipeline",
    ),
    Fault(
        PIPELINE,
        "the overrides of a step are dropped",
        find='((${#fields[@]} == 3)) || job+=("${fields[@]:3}")',
        replace=":",
        tests=f"{TEST_LAUNCH} -k 'pipeline or awkward'",
    ),
    Fault(
        PIPELINE,
        "steps of one process get all nodes",
        find="[[ $processes == one ]] || nodes=",
        replace="nodes=",
        tests=f"{TEST_LAUNCH} -k pipeline",
    ),
    Fault(
        DOCKER,
        "a machine without GPUs asks for them",
        find="[[ ${GPUS:-all} == none ]] ||",
        replace="false ||",
        tests=f"{TEST_LAUNCH} -k docker",
    ),
    Fault(
        "minitron_nemo/distributed/launch.py",
        "ranks on GPUs are forked from a process that may have started CUDA",
        find='return multiprocessing.get_context("spawn")',
        replace='return multiprocessing.get_context("fork")',
        tests="tests/unit/test_torch_on_cpu.py",
    ),
    Fault(
        "minitron_nemo/artefacts/lock.py",
        "two runs write one output",
        find="fcntl.LOCK_EX | fcntl.LOCK_NB",
        replace="fcntl.LOCK_SH | fcntl.LOCK_NB",
        tests="tests/unit/test_disk_and_locks.py",
    ),
    Fault(
        "minitron_nemo/steps/step.py",
        "an output may replace what it is made from",
        find="        self._check_apart()\n",
        replace="",
        tests="tests/unit/test_jobs.py",
    ),
    Fault(
        "minitron_nemo/training/loop.py",
        "a run that is asked to stop goes on",
        find="        if stop:\n",
        replace="        if False:\n",
        tests="tests/distributed/test_resume.py",
    ),
    Fault(
        "minitron_nemo/checkpoint/geometry.py",
        "boxes that touch share an element",
        find="if any(b >= e for b, e",
        replace="if any(b > e for b, e",
        tests="tests/unit/test_geometry.py",
    ),
    Fault(
        "minitron_nemo/distributed/launch.py",
        "ranks meet at a port that the kernel hands out",
        find="first - 1 - secrets.randbelow(first - FIRST_PORT)",
        replace="first + secrets.randbelow(first - FIRST_PORT)",
        tests="tests/distributed/test_ends_of_ranks.py -k hands_to_nobody",
    ),
    Fault(
        "minitron_nemo/distributed/stopping.py",
        "a signal repeated while a stopped run ends interrupts it",
        find="_hearing[-1].first = heard.first",
        replace="pass",
        tests="tests/distributed/test_ends_of_ranks.py -k heard_inside",
    ),
    Fault(
        "minitron_nemo/garbage.py",
        "what a command makes is never collected",
        find="    gc.freeze()\n    gc.enable()\n",
        replace="    gc.freeze()\n",
        tests="tests/unit/test_garbage.py",
    ),
    Fault(
        "minitron_nemo/garbage.py",
        "garbage of every step of a pipeline stays",
        find="@functools.cache\n",
        replace="",
        tests="tests/unit/test_garbage.py",
    ),
]
