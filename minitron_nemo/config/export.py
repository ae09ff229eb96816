"""Settings of the export to Hugging Face."""

from dataclasses import dataclass

from minitron_nemo.artefacts.upstream import HUB_NAME, LICENCE_NAME
from minitron_nemo.config.setting import path, setting


@dataclass
class ExportHfConfig:
    """A folder that `transformers` opens, with the card, notice and licence files that a page on the hub needs."""

    checkpoint: str | None = path("model to export", place="student.nemo")
    output: str | None = path("Hugging Face folder", place="{checkpoint}_hf")
    model_name: str | None = setting(
        None, "what the card calls it; null: the folder's name, begun as the licence asks", later=True
    )
    base_model: str | None = setting(
        None,
        "hub name of the model that it comes from, for the card; null: the one that was imported",
        pattern=HUB_NAME,
        form="owner/model",
        later=True,
    )
    license: str | None = setting(
        None,
        "its name on the hub, for the card; null: that of the model that was imported",
        pattern=LICENCE_NAME,
        form="a name such as apache-2.0",
        later=True,
    )
    evaluation: str | None = path("scores for the card; null: `eval/` of the same run, where this model is in it")
