"""All hostile artefacts by their names."""

from hostile import archives, folders, foreign, pickles, texts

CASES = {case.name: case for module in (pickles, texts, folders, foreign, archives) for case in module.cases()}
