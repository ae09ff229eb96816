"""Faults in manifests, publishing, fingerprints and the report."""

from mutants.fault import Fault

MANIFEST = "minitron_nemo/artefacts/manifest.py"
PUBLISHING = "minitron_nemo/artefacts/publishing.py"
SETTINGS = "minitron_nemo/steps/settings.py"
COLLECT = "minitron_nemo/reporting/collect.py"
TEST_MANIFEST = "tests/unit/test_manifest.py"
TEST_REPORT = "tests/unit/test_report.py"
FINGERPRINT = "tests/recipes/test_command_line.py -k the_fingerprint"

FAULTS = [
    Fault(
        MANIFEST,
        "files are not hashed when they are verified",
        find='if name not in hashes or hashes[name].result() != manifest.files[name]["sha256"]:',
        replace="if False:",
        tests=f"{TEST_MANIFEST} -k damaged",
    ),
    Fault(
        MANIFEST,
        "hashing goes on after a damaged file was found",
        find="            ended.set()\n            pool",
        replace="            pool",
        tests="tests/unit/test_manifest.py -k nobody_waits_for",
    ),
    Fault(
        MANIFEST,
        "of processes that share the reading, each reads the same files",
        find="by_size[part::parts]",
        replace="by_size[::parts]",
        tests=f"{TEST_MANIFEST} -k share",
    ),
    Fault(
        "minitron_nemo/steps/execute.py",
        "two runs make one output at once",
        find='    with locked(job.output, purpose="step"):\n        yield',
        replace="    yield",
        tests="tests/unit/test_disk_and_locks.py -k same_output",
    ),
    Fault(
        MANIFEST,
        "a truncated artefact is whole",
        find='!= entry["size"]:',
        replace="is None:",
        tests=f"{TEST_MANIFEST} -k 'current or damaged'",
    ),
    Fault(
        MANIFEST,
        "whatever is there was made by this configuration",
        find="return manifest.fingerprint == fingerprint",
        replace="return True",
        tests=f"{TEST_MANIFEST} -k current",
    ),
    Fault(
        MANIFEST,
        "an artefact of another kind is taken",
        find="if kind is not None and manifest.kind != kind:",
        replace="if False:",
        tests=f"{TEST_MANIFEST} -k another_kind",
    ),
    Fault(
        "minitron_nemo/artefacts/origin.py",
        "the fingerprint ignores the parents",
        find="fingerprint_of(kind, config, parents)",
        replace="fingerprint_of(kind, config)",
        tests="tests/unit/test_origin.py",
    ),
    Fault(
        "minitron_nemo/artefacts/origin.py",
        "the fingerprint changes with the order of keys",
        find="sort_keys=True, ",
        replace="",
        tests=f"{TEST_MANIFEST} -k fingerprint",
    ),
    Fault(
        PUBLISHING,
        "an output is replaced without being asked",
        find='    if not overwrite:\n        raise UserError(f"{path} exists already',
        replace='    if False:\n        raise UserError(f"{path} exists already',
        tests=f"{TEST_MANIFEST} -k replaced_only",
    ),
    Fault(
        PUBLISHING,
        "a folder that is no artefact is overwritten",
        find="is_empty or _is_artefact(path))",
        replace="True)",
        tests=f"{TEST_MANIFEST} -k no_artefact_is_never",
    ),
    Fault(
        PUBLISHING,
        "a step that failed leaves its draft behind",
        find="shutil.rmtree(self._temp, ignore_errors=True)",
        replace="pass",
        tests=f"{TEST_MANIFEST} -k failed",
    ),
    Fault(
        PUBLISHING,
        "a full disk is written to",
        find="free < 1.1 * needed",
        replace="free < 0",
        tests=f"{TEST_MANIFEST} -k disk",
    ),
    Fault(
        "minitron_nemo/artefacts/records.py",
        "an evaluation made with other settings is current",
        find='["fingerprint"] == fingerprint',
        replace='["fingerprint"] != ""',
        tests="tests/unit/test_origin.py",
    ),
    Fault(
        SETTINGS,
        "the precision is not in the fingerprint",
        find='"precision": precision_in_words(config),',
        replace="",
        tests=FINGERPRINT,
    ),
    Fault(
        SETTINGS,
        "what is read is not in the fingerprint",
        find="**blend.identity()",
        replace="",
        tests=FINGERPRINT,
    ),
    Fault(
        "minitron_nemo/config/schema.py",
        "the temperature is not in the fingerprint",
        find='"divides both logits in divergences between distributions",',
        replace='"divides both logits in divergences between distributions", how_it_runs=True,',
        tests=FINGERPRINT,
    ),
    Fault(
        "minitron_nemo/config/schema.py",
        "how a step runs is in the fingerprint",
        find="if said.how_it_runs or (",
        replace="if (",
        tests="tests/unit/test_config.py -k identity",
    ),
    Fault(
        "minitron_nemo/data/blend.py",
        "another corpus of the same name has the same fingerprint",
        find="content_fingerprint(prefix) for",
        replace="name for",
        tests="tests/unit/test_blend_identity.py",
    ),
    Fault(
        COLLECT,
        "records come in the order of the file",
        find="[steps[step] for step in sorted(steps)]",
        replace="list(steps.values())",
        tests="tests/unit/test_report_cells.py",
    ),
    Fault(
        COLLECT,
        "a metric's former name wins",
        find="return former | {name: value for name, value in record.items() if name not in FORMER_NAMES}",
        replace="return {name: value for name, value in record.items() if name not in FORMER_NAMES} | former",
        tests=f"{TEST_REPORT} -k former",
    ),
    Fault(
        "minitron_nemo/reporting/table.py",
        "agreement is printed as a fraction",
        find='".1%"',
        replace='".1f"',
        tests="tests/unit/test_report_cells.py",
    ),
    Fault(
        "minitron_nemo/reporting/page.py",
        "a title is not escaped",
        find="title = escape(report.title)",
        replace="title = report.title",
        tests=f"{TEST_REPORT} -k escaped",
    ),
]
