"""Settings of importance: what is scored on which samples, by which criteria, and how jobs are joined."""

import dataclasses
from dataclasses import dataclass
from enum import Enum

from minitron_nemo.config.setting import count, path, setting
from minitron_nemo.errors import UserError


class Aggregation(Enum):
    """How activations become one number (paper 1): over the sequence, then over the samples."""

    mean = "mean"
    l2 = "l2"
    variance = "variance"


_GRADIENT = ("taylor", "loss_change")


@dataclass
class CriteriaConfig:
    """By what each axis is scored; docs/method.md has the formulas. The defaults are the published code's."""

    num_layers: str = setting("cosine", "layers", choices=("cosine", *_GRADIENT), later=True)
    hidden_size: str = setting(
        "norm_outputs",
        "hidden channels",
        choices=("norm_outputs", "equal_layers", "with_final_norm", "equal_layers_with_final_norm", *_GRADIENT),
        later=True,
    )
    ffn_hidden_size: str = setting(
        "after_activation", "neurons", choices=("after_activation", "before_activation", *_GRADIENT), later=True
    )
    num_attention_heads: str = setting(
        "token_norm", "query heads", choices=("token_norm", "channel_norm", *_GRADIENT), later=True
    )
    num_query_groups: str = setting(
        "token_norm", "query groups", choices=("token_norm", "channel_norm", *_GRADIENT), later=True
    )

    def named(self) -> dict[str, str]:
        """The criterion of every axis, those that are the default left out."""
        given = ((field.name, getattr(self, field.name), field.default) for field in dataclasses.fields(self))
        return {axis: name for axis, name, default in given if name != default}


@dataclass
class EstimateImportanceConfig:
    """Forward passes over calibration samples (paper 1; paper 2)."""

    checkpoint: str | None = path("model to score", place="corrected_teacher.nemo")
    output: str | None = path("folder of scores", place="importance")
    num_samples: int = count(
        1024,
        "for calibration, each of `data.seq_length` tokens; a multiple of micro-batch x data-parallel ranks",
        unit="samples",
    )
    first_sample: int = count(
        0,
        "of the `num_samples` that this job takes, counted from 0; jobs that share a set out are joined by "
        "`merge_importance`",
        at_least=0,
        unit="samples",
        later=True,
    )
    take_samples: int | None = count(
        None, "how many this job takes; null: all from `first_sample` on", unit="samples", later=True
    )
    micro_batch_size: int = count(1, "in a forward pass", unit="samples", how_it_runs=True)
    save_every_n_samples: int = count(
        64, "between saves of the sums, from which a run that stopped goes on", unit="samples", how_it_runs=True
    )
    sequence_aggregation: Aggregation = setting(Aggregation.mean, "over the tokens of a sample")
    batch_aggregation: Aggregation = setting(Aggregation.l2, "over the samples")
    second_moments: bool = setting(
        False,
        "keep the second moments that `prune.repairs` needs beside the scores; large (docs/method.md), and twice that "
        "at every save",
        later=True,
    )
    criteria: CriteriaConfig = setting(CriteriaConfig(), "by what each axis is scored, see its rows", later=True)

    @property
    def samples(self) -> range:
        """The samples of the set that this job takes. Raises UserError when there are none or not so many."""
        left = self.num_samples - self.first_sample
        if left < 1:
            raise UserError(
                f"estimate_importance.first_sample={self.first_sample}: must be below num_samples={self.num_samples}, "
                "the size of the whole set"
            )
        if self.take_samples is not None and self.take_samples > left:
            raise UserError(
                f"estimate_importance.take_samples={self.take_samples}: only {left} samples of the set are left from "
                f"first_sample={self.first_sample} on; take_samples=null takes them"
            )
        return range(self.first_sample, self.first_sample + (self.take_samples or left))


@dataclass
class MergeImportanceConfig:
    """Add up the sums of several jobs over different samples of one calibration set; no model is run."""

    inputs: list[str] = setting(
        [], "score folders of `estimate_importance`; one alone is finished anew", how_it_runs=True
    )
    output: str | None = path("folder of scores", place="importance")
    batch_aggregation: Aggregation | None = setting(None, "over the samples; null: that of the inputs")


@dataclass
class CompareImportanceConfig:
    """How many of the units that `prune.target` keeps two scores have in common; no model is run."""

    inputs: list[str] = setting(
        [],
        "score folders, of which all pairs are compared; of one alone the first eighth, quarter and half of its "
        "samples and all of them",
        how_it_runs=True,
    )
    output: str | None = path("JSON file; a heat map for each axis goes beside it", place="importance_overlap.json")
