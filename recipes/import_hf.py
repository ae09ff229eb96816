"""Import: a Hugging Face folder (or hub name) becomes a sharded `.nemo` model; its shape comes from the folder."""

from pathlib import Path

from minitron_nemo.checkpoint.hf import arch_from_hf, import_hf, resolve_source
from minitron_nemo.checkpoint.manifest import file_sha256
from minitron_nemo.cli import Job, Recipe, logger, main
from minitron_nemo.config import Config
from minitron_nemo.errors import UserError
from minitron_nemo.parameters import logical_tensors
from minitron_nemo.progress import progress


def prepare(config: Config) -> Job:
    section = config.import_hf
    if section.source is None:
        raise UserError("import_hf.source is not set: give a Hugging Face folder or hub name")
    folder = resolve_source(section.source)
    logger.info(f"import_hf: {folder}: {arch_from_hf(folder).describe()}")
    # Size and time of the weight files stand for their content: hashing tens of gigabytes to skip a copy is no gain.
    weights = {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))
    }
    small = {path.name: file_sha256(path) for path in sorted(folder.glob("*.json"))}
    return Job(Path(str(section.output)), "model", {"weights": weights, "files": small})


def run(config: Config, job: Job) -> None:
    folder = resolve_source(str(config.import_hf.source))
    with progress(len(logical_tensors(arch_from_hf(folder))), "import", unit="tensor") as bar:
        import_hf(folder, job.output, progress=lambda done, total: bar.advance(), **job.origin)


RECIPE = Recipe("import_hf", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
