"""Each class of holes that NeMo, Megatron-LM and the libraries below them had, by an artefact that tries it here.

The numbers are those of NVIDIA's product-security bulletins and of PyTorch's and Hydra's advisories, read up to August
2026: about 65 of this family, of which 28 are deserialization (CWE-502) and 26 code injection (CWE-94).
"""

import pytest
from hostile.corpus import CASES

# What went wrong, by whom and under which number -> the artefacts of the corpus that do the same.
HOLES = {
    "CVE-2024-0129, NeMo: a member of a .nemo tar is written above the folder (CWE-22)": [
        "tar with an entry that climbs out", "tar with an entry that is absolute",
    ],
    "CVE-2025-23360, NeMo: a relative path leaves the folder on the way (CWE-23)": [
        "tar with an entry that climbs out from inside", "tar with an entry that climbs out behind a dot",
        "tar with an entry that is renamed by pax",
    ],
    "CVE-2025-23250, NeMo: a path in a checkpoint's own files (CWE-22)": [
        "manifest.json that names a file above", "metadata with a file above", "index that names a file above",
    ],
    "CVE-2025-23249, 23303, NeMo (CWE-502); 2026-24150 to 24152, Megatron-LM: a checkpoint is unpickled": [
        "metadata runs code in protocol 4", "metadata names os.system", "chunk that runs code",
        "file of a rank that runs code", "common.pt that runs code",
    ],
    "CVE-2025-23304, NeMo; 2026-22584 and Hydra's advisory of January 2026: _target_ of a config is called (CWE-94)": [
        "model_config.yaml with '_target_'", "model_config.yaml with 'target'",
        "model_config.yaml with a mapping for a precision", "config.json that has a _target_ nobody reads",
        "plan.json that has a _target_", "index that names a mapping",
    ],
    "CVE-2025-23251, 23312 to 23315, NeMo (CWE-94); 2025-23305, 23306, Megatron-LM: text of a config becomes code": [
        "model_config.yaml that applies a function", "model_config.yaml that names a function",
        "model_config.yaml that asks the environment", "metadata names builtins.eval",
    ],
    "CVE-2026-65178, NeMo Speech: a hostile model_config.yaml": [
        "model_config.yaml that makes an object", "model_config.yaml that unfolds as a number",
    ],
    "CVE-2026-65179, NeMo Speech: a pickled tokenizer (CWE-502)": [
        "tokenizer with a pickle for a file", "tokenizer with only a pickled model",
    ],
    "CVE-2025-33205, NeMo: code that came along is included (CWE-829)": [
        "folder with code, which nobody runs", "tokenizer with its own code, which nobody runs",
        "config.json that wants its own code",
    ],
    "CVE-2025-33239, 33240, Megatron-Bridge: a Hugging Face folder brings code": [
        "config.json that names another class", "config.json that wants its own code",
    ],
    "CVE-2026-24141, ModelOpt: pickled state beside the weights": [
        "folder with pickled weights alone", "common.pt that runs code in the old form",
    ],
    "allow-lists by prefix: what an allowed module exports again": [
        "metadata names torch.os.system", "metadata names torch.ctypes.CDLL", "metadata names torch.hub.load",
        "metadata names torch.load",
    ],
    "CVE-2025-32434, PyTorch: weights_only is led around": [
        "chunk that runs code in the old form", "chunk that unfolds", "file of a rank that runs code in the old form",
    ],
    "CVE-2026-24747, PyTorch: the weights-only unpickler writes where it must not": [
        "metadata with memo_of_gigabytes", "metadata with endless_number", "metadata with build_of_a_list",
        "chunk that says it has 2^62 elements", "chunk that is one element many times",
    ],
    "Stanza and others: a refusal is answered by loading without the guard": [
        "chunk that runs code as a saved object", "metadata with reduce_of_a_text",
    ],
    "NeMo Speech 15811: the last of two members of one name wins": [
        "tar with an entry that comes twice", "tar with an entry that comes twice under another name",
    ],
    "links and devices of a tar": [
        "tar with an entry that is a link", "tar with an entry that is a hard link",
        "tar with an entry that is a device", "tar with an entry that is a link for a folder",
    ],
    "CVE-2025-8194, Python: a tar whose offsets go back is read for ever": [
        "tar with an entry that has -1 bytes", "tar with an entry that is a pax header of -512 bytes",
        "tar with an entry that has its size from pax",
    ],
    "weak hashes, as CVE-2026-65104 of Megatron-LM: content that nobody vouches for": [
        "manifest.json that has no hash", "manifest.json that does not know a file",
        "manifest.json that does not list the config",
    ],
}  # fmt: skip


@pytest.mark.parametrize("hole", HOLES)
def test_the_corpus_tries_every_class_of_known_holes(hole):
    """That each is refused is what `test_hostile_corpus.py` tests, by these names."""
    assert HOLES[hole]
    assert not [name for name in HOLES[hole] if name not in CASES]
