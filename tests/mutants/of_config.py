"""Faults in ranges, relations and the composition of configs, in published configs, and in what layouts divide."""

from mutants.fault import Fault

LAYOUT = "minitron_nemo/distributed/layout.py"
SETTING = "minitron_nemo/config/setting.py"
RULES = "minitron_nemo/config/rules.py"
TEST_LAYOUT = "tests/unit/test_layout.py"
TEST_CONFIG = "tests/unit/test_config.py"

FAULTS = [
    Fault(
        LAYOUT,
        "every data-parallel rank's share begins where the first's does",
        find="begin = start + dp_rank * self.samples",
        replace="begin = start",
        tests=f"{TEST_LAYOUT} -k shares",
    ),
    Fault(
        LAYOUT,
        "a batch that does not divide loses samples",
        find="if samples < 1 or samples % step:",
        replace="if samples < 1:",
        tests=f"{TEST_LAYOUT} -k leave_samples_out",
    ),
    Fault(
        LAYOUT,
        "the last pipeline stages get the layers left over",
        find="(chunk < num_layers % chunks)",
        replace="(chunk >= chunks - num_layers % chunks)",
        tests=f"{TEST_LAYOUT} -k stages",
    ),
    Fault(
        LAYOUT,
        "stages may lose a layer",
        find="or sum(split) != num_layers or",
        replace="or",
        tests=f"{TEST_LAYOUT} -k stages",
    ),
    Fault(
        LAYOUT,
        "the vocabulary is padded alike for every degree",
        find="VOCABULARY_MULTIPLE * self.tp",
        replace="VOCABULARY_MULTIPLE",
        tests=f"{TEST_LAYOUT} -k vocabulary",
    ),
    Fault(
        LAYOUT,
        "tensor parallelism need not divide a shape",
        find="if (size := getattr(arch, axis)) % self.tp:",
        replace="if (size := getattr(arch, axis)) < self.tp:",
        tests=f"{TEST_LAYOUT} -k legal",
    ),
    Fault(
        LAYOUT,
        "ranks that no pipeline has are counted",
        find="if ranks < 1 or ranks % (tp * pp * cp):",
        replace="if ranks < 1 or ranks % tp:",
        tests=f"{TEST_LAYOUT} {TEST_CONFIG} -k 'leave_is_data or does_not_divide or cannot_be'",
    ),
    Fault(
        LAYOUT,
        "sequence parallel ranks need not share a sequence evenly",
        find="if self.sequence_parallel and (seq_length // self.cp) % self.tp:",
        replace="if False:",
        tests=f"{TEST_LAYOUT} -k sequence",
    ),
    Fault(
        RULES,
        "the learning rate may end above its peak",
        find="if optim.min_lr > optim.lr:",
        replace="if False:",
        tests=f"{TEST_CONFIG} -k bad_input",
    ),
    Fault(
        RULES,
        "nothing need be minimized",
        find="if distill.kl_weight == distill.cross_entropy_weight == 0:",
        replace="if False:",
        tests=f"{TEST_CONFIG} -k bad_input",
    ),
    Fault(
        "minitron_nemo/shape/arch.py",
        "rope scaling may turn its limits round",
        find="self.low_freq_factor >= self.high_freq_factor",
        replace="self.low_freq_factor < 0",
        tests=f"{TEST_CONFIG} -k bad_input",
    ),
    Fault(
        SETTING,
        "a number may be no number",
        find="if not math.isfinite(value):",
        replace="if False:",
        tests=f"{TEST_CONFIG} -k bad_input",
    ),
    Fault(
        SETTING,
        "what must be above a bound may be the bound",
        find="value > self.above",
        replace="value >= self.above",
        tests=f"{TEST_CONFIG} -k 'cannot_mean or bad_input'",
    ),
    Fault(
        SETTING,
        "no setting is too large",
        find="value <= self.at_most",
        replace="True",
        tests=f"{TEST_CONFIG} -k 'cannot_mean or bad_input'",
    ),
    Fault(
        SETTING,
        "a text may be empty",
        find="if not value.strip() or",
        replace="if",
        tests=f"{TEST_CONFIG} -k 'cannot_mean or bad_input'",
    ),
    Fault(
        "minitron_nemo/config/closing.py",
        "paths are not under the run folder",
        find="Path(config.run_dir) / place",
        replace='Path("runs") / place',
        tests=f"{TEST_CONFIG} -k run_folder",
    ),
    Fault(
        "minitron_nemo/steps/inputs.py",
        "student and teacher may have different tokenizers",
        find="if ours.fingerprint != theirs.fingerprint:",
        replace="if False:",
        tests="tests/recipes/test_command_line.py -k 'bad_input and tokenizers'",
    ),
    Fault(
        "minitron_nemo/steps/inputs.py",
        "a sample may be longer than the model's positions",
        find="if config.data.seq_length > model.arch.seq_length:",
        replace="if False:",
        tests="tests/recipes/test_command_line.py -k 'bad_input and positions'",
    ),
    Fault(
        "minitron_nemo/shape/arch.py",
        "a tied table is counted twice",
        find="1 if self.share_embeddings_and_output_weights else 2",
        replace="2",
        tests="tests/unit/test_arch_counts.py",
    ),
    Fault(
        "minitron_nemo/shape/arch.py",
        "attention costs no compute",
        find=" + 2.0 * seq_length * self.query_size * self.num_layers",
        replace="",
        tests="tests/unit/test_arch_counts.py",
    ),
    Fault(
        "minitron_nemo/cli.py",
        "help and refusals wait for torch",
        find="import signal\nimport sys\n",
        replace="import signal\nimport sys\nimport torch\n",
        tests="tests/recipes/test_light_start.py -k no_tensor",
    ),
]
