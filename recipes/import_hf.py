"""Import: a Hugging Face folder (or hub name) becomes a sharded `.nemo` model; its shape comes from the folder."""

import dataclasses
from pathlib import Path

from minitron_nemo.artefacts.manifest import file_sha256
from minitron_nemo.artefacts.signature import check_signature
from minitron_nemo.cli import main
from minitron_nemo.config.schema import Config, identity
from minitron_nemo.data.tokenizer import load_tokenizer
from minitron_nemo.errors import UserError
from minitron_nemo.progress import watched
from minitron_nemo.shape.arch import ModelArch
from minitron_nemo.steps.describe import model_lines, shapes
from minitron_nemo.steps.step import Job, Recipe, logger

# What does not change a tensor: here the folder counts, and the config's `model` is told to be unused.
FROM_THE_FOLDER = ("family", "seq_length", "norm_epsilon", "rotary_base", "rotary_percent", "rope_scaling")


def check_shape(found: ModelArch, config: Config, *, folder: Path) -> None:
    """Refuse a folder with another shape than the config's `model`, which every dry run went by."""
    if config.model is None:
        return
    expected = config.model_arch()
    fields = [field.name for field in dataclasses.fields(ModelArch)]
    differing = [name for name in fields if getattr(found, name) != getattr(expected, name)]
    theirs, ours = (", ".join(f"{f}={getattr(arch, f)}" for f in differing) for arch in (found, expected))
    if not set(differing) <= set(FROM_THE_FOLDER):
        raise UserError(f"{folder}: {theirs}; the config's model has {ours}: give that model, or correct `model`")
    if differing:
        logger.info(f"import_hf: {folder}: {theirs}; the config's model has {ours}: the folder's is used")


def prepare(config: Config) -> Job:
    section = config.import_hf
    if section.source is None:
        raise UserError("import_hf.source is not set: give a Hugging Face folder or hub name")
    # torch takes seconds to import: not before there is something to read.
    from minitron_nemo.checkpoint.formats.hf import arch_from_hf, resolve_source, source_files

    folder = resolve_source(section.source)
    check_signature(folder)  # its files are hashed when they are opened to be imported
    arch = arch_from_hf(folder)
    check_shape(arch, config, folder=folder)
    logger.info(f"import_hf: {folder}: {arch.describe()}")
    files = source_files(folder)
    load_tokenizer(folder)  # a model that no text can be given to is of no use to the steps after this one
    # Size and time of the weight files stand for their content: hashing tens of gigabytes to skip a copy is no gain.
    weights = {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))
    }
    small = {name: file_sha256(path) for name, path in sorted(files.items())}
    settings = {**identity(section), "weights": weights, "files": small}
    return Job(Path(str(section.output)), "model", settings, inputs=(folder,))


def run(config: Config, job: Job) -> None:
    from minitron_nemo.checkpoint.formats.hf import import_hf, open_hf, resolve_source
    from minitron_nemo.checkpoint.source import stream

    source = str(config.import_hf.source)
    folder = open_hf(resolve_source(source))
    tensors = watched(stream(folder.weights), len(folder.weights.names()), "import", unit="tensor")
    import_hf(folder, job.output, tensors=tensors, origin=job.origin, given=source)


RECIPE = Recipe("import_hf", prepare, run, lines=lambda config: model_lines(config, shapes(config).cut))

if __name__ == "__main__":
    main(RECIPE)
