"""Export: a sharded `.nemo` model becomes a Hugging Face folder that `transformers` opens with the same logits."""

from pathlib import Path

from minitron_nemo.checkpoint.hf import KIND, export_hf
from minitron_nemo.checkpoint.nemo import open_nemo
from minitron_nemo.cli import Job, Recipe, main, open_verified
from minitron_nemo.config import Config
from minitron_nemo.parameters import logical_tensors
from minitron_nemo.progress import progress


def prepare(config: Config) -> Job:
    model = open_verified(str(config.export_hf.checkpoint))
    return Job(Path(str(config.export_hf.output)), KIND, {}, {"model": model.path})


def run(config: Config, job: Job) -> None:
    model = open_nemo(str(config.export_hf.checkpoint))
    with progress(len(logical_tensors(model.arch)), "export", unit="tensor") as bar:
        export_hf(model, job.output, progress=lambda done, total: bar.advance(), **job.origin)


RECIPE = Recipe("export_hf", prepare, run)

if __name__ == "__main__":
    main(RECIPE)
