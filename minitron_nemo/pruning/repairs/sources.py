"""Repairs of a cut: each a source around the one before it, so that tensors still come one at a time.

    source -> head residual -> cut -> norm scale -> least squares -> norm bias

A tensor that a repair does not concern passes unread. Repaired tensors are computed in float64 and stored in the dtype
of the source. Nothing removed means nothing changed.

Shapes: O outputs, U inputs of the source, K of them kept.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron_nemo.checkpoint.geometry import Box
from minitron_nemo.checkpoint.source import ShapedSource, TensorSource
from minitron_nemo.errors import UserError
from minitron_nemo.importance.scores import ImportanceScores
from minitron_nemo.importance.second_moments import SecondMomentFile
from minitron_nemo.importance.sites import HEAD_CHANNELS, NEURONS
from minitron_nemo.pruning.cut import PrunedSource, kept_elements
from minitron_nemo.pruning.plan import PruningPlan
from minitron_nemo.pruning.repairs.head_residual import HeadResidual
from minitron_nemo.pruning.repairs.least_squares import refit, ridge_solve
from minitron_nemo.pruning.repairs.residual import NORMS, NormMoments, NormRows, affine
from minitron_nemo.shape.tensors import EMBEDDING, OUTPUT, LogicalTensor


@dataclass(frozen=True)
class Repairs:
    """Which repairs are made; `config.repairs.RepairsConfig` says what each means."""

    head_residual: str | None = None  # plus or minus
    norm_scale: bool = False
    projections: bool = False
    residual_stream: bool = False
    norm_bias: bool = False
    ridge: float = 1e-3


def repaired(
    source: TensorSource,
    plan: PruningPlan,
    repairs: Repairs,
    *,
    scores: ImportanceScores | None = None,
    moments: SecondMomentFile | None = None,
) -> TensorSource:
    """The pruned model of `source`, with repairs.

    `scores` are needed for the head residual, `moments` for all others; both of the model that is cut. Raises UserError
    for a repair that this model or plan does not allow.
    """
    if repairs.norm_bias and not plan.source.has_norm_bias:
        raise UserError(
            f"prune.repairs.norm_bias: norms of this model have no bias ({plan.source.normalization}); "
            "leave the repair out"
        )
    uncut = source
    if repairs.head_residual is not None:
        assert scores is not None
        uncut = HeadResidual(source, plan, scores, sign=repairs.head_residual)
    found: TensorSource = PrunedSource(uncut, plan)
    if repairs == Repairs(head_residual=repairs.head_residual, ridge=repairs.ridge):
        return found
    assert moments is not None
    if repairs.norm_scale:
        found = NormScale(found, plan, moments)
    if repairs.projections or repairs.residual_stream:
        found = LeastSquares(
            found, uncut, plan, moments, projections=repairs.projections, residual_stream=repairs.residual_stream,
            ridge=repairs.ridge,
        )  # fmt: skip
    if repairs.norm_bias:
        found = NormBias(found, source, plan, moments, ridge=repairs.ridge)
    return found


class _Repair(ShapedSource, ABC):
    """A pruned model around another one, some of whose tensors are computed anew."""

    def __init__(self, inner: TensorSource, plan: PruningPlan, moments: SecondMomentFile) -> None:
        super().__init__(plan.target, made_of=inner)
        self.inner, self.plan, self.moments = inner, plan, moments

    def dtype(self, name: str) -> torch.dtype:
        return self.inner.dtype(name)

    def read(self, name: str, box: Box | None = None) -> Tensor:
        if (found := self.repair(self.tensors[name])) is None:
            return self.inner.read(name, box)
        if not torch.isfinite(found).all():
            raise UserError(f"prune.repairs: {name} is not finite after {type(self).__name__}; raise the ridge")
        found = found.to(self.dtype(name))
        return found if box is None else found[box.slices()]

    @abstractmethod
    def repair(self, tensor: LogicalTensor) -> Tensor | None:
        """The tensor of the pruned model, None when it stays what it is."""

    def origin(self, tensor: LogicalTensor) -> LogicalTensor:
        """The tensor of the source that it was cut from."""
        return dataclasses.replace(tensor, layer=self.origin_layer(tensor))

    def origin_layer(self, tensor: LogicalTensor) -> int | None:
        return None if tensor.layer is None else self.plan.layers[tensor.layer]

    def kept_channels(self) -> Tensor | None:
        """Channels of the residual stream that stay, None when all do."""
        if self.plan.source.hidden_size == self.plan.target.hidden_size:
            return None
        return torch.tensor(self.plan.units("hidden_size"))

    def norm_moments(self, norm: NormRows, tensor: LogicalTensor) -> NormMoments:
        layer = self.origin_layer(tensor)
        return NormMoments.read(self.moments, norm, layer, is_layer_norm=self.plan.source.has_norm_bias)


class NormScale(_Repair):
    """Weights of norms times sqrt(kept energy / energy of all), because the kept channels have another mean square."""

    def repair(self, tensor: LogicalTensor) -> Tensor | None:
        kept_K = self.kept_channels()
        norm = next((norm for norm in NORMS if tensor.name == f"{norm.prefix_of(tensor.layer)}weight"), None)
        if norm is None or kept_K is None:
            return None
        scale = self.norm_moments(norm, tensor).scale(kept_K)
        weight_K, _ = affine(self.inner, norm.prefix_of(tensor.layer))
        return weight_K * scale - (1 if self.arch.has_norm_bias else 0)


class LeastSquares(_Repair):
    """Matrices whose inputs were removed, refitted on the inputs that stay (`least_squares.refit`)."""

    def __init__(
        self,
        inner: TensorSource,
        uncut: TensorSource,
        plan: PruningPlan,
        moments: SecondMomentFile,
        *,
        projections: bool,
        residual_stream: bool,
        ridge: float,
    ) -> None:
        """`uncut` is the source with all inputs; `projections` and `residual_stream` say which matrices."""
        super().__init__(inner, plan, moments)
        self.uncut, self.ridge = uncut, ridge
        self.projections, self.residual_stream = projections, residual_stream

    def repair(self, tensor: LogicalTensor) -> Tensor | None:
        if len(tensor.row.dims) != 2 or (gram_UU := self._gram(tensor)) is None:
            return None
        kept_K = kept_elements(tensor, 1, plan=self.plan)
        assert kept_K is not None
        weight_OU = self.uncut.read(self.origin(tensor).name)
        if (outputs := kept_elements(tensor, 0, plan=self.plan)) is not None:
            weight_OU = weight_OU[outputs]
        return refit(weight_OU, kept_K, gram_UU, ridge=self.ridge)

    def _gram(self, tensor: LogicalTensor) -> Tensor | None:
        """Second moments of the inputs of a matrix that is to be refitted; None for any other tensor."""
        layer = self.origin_layer(tensor)
        sites = {"linear_proj.weight": HEAD_CHANNELS.name, "linear_fc2.weight": NEURONS.name}
        for ending, site in sites.items():
            if tensor.name.endswith(ending):
                wanted = self.projections and kept_elements(tensor, 1, plan=self.plan) is not None
                return self.moments.sums(site, layer)[0] if wanted else None
        norm = next((norm for norm in NORMS if tensor.name == norm.reader_of(tensor.layer)), None)
        if norm is None or not self.residual_stream or self.kept_channels() is None:
            return None
        weight_H, bias_H = affine(self.uncut, norm.prefix_of(layer))
        return self.norm_moments(norm, tensor).gram_of_output(weight_H, bias_H)


class NormBias(_Repair):
    """Biases of norms plus what makes up, in the mean over tokens, for removed channels in the matrix behind the norm.

    With z what the norm of the source gives its matrix W, and z' what the pruned norm gives the pruned (and perhaps
    refitted) W', the bias gets the d that minimizes || W' d - ( W mean(z) - W' mean(z') ) ||^2, with a ridge.
    """

    def __init__(
        self, inner: TensorSource, source: TensorSource, plan: PruningPlan, moments: SecondMomentFile, *, ridge: float
    ) -> None:
        super().__init__(inner, plan, moments)
        self.source, self.ridge = source, ridge

    def repair(self, tensor: LogicalTensor) -> Tensor | None:
        kept_K = self.kept_channels()
        norm = next((norm for norm in NORMS if tensor.name == f"{norm.prefix_of(tensor.layer)}bias"), None)
        if norm is None or kept_K is None:
            return None
        reader = norm.reader_of(tensor.layer)
        if reader == OUTPUT and self.arch.share_embeddings_and_output_weights:
            reader = EMBEDDING
        moments, origin = self.norm_moments(norm, tensor), self.origin(self.tensors[reader])
        weight_H, bias_H = affine(self.source, norm.prefix_of(self.origin_layer(tensor)))
        weight_K, bias_K = affine(self.inner, norm.prefix_of(tensor.layer))
        before_OH = self.source.read(origin.name).double()
        if (outputs := kept_elements(self.tensors[reader], 0, plan=self.plan)) is not None:
            before_OH = before_OH[outputs]
        after_OK = self.inner.read(reader).double()
        missing_O = before_OH @ (weight_H * moments.means + bias_H)
        missing_O = missing_O - after_OK @ (weight_K * moments.mean_after(kept_K) + bias_K)
        return bias_K + ridge_solve(after_OK.T @ after_OK, (after_OK.T @ missing_O)[:, None], ridge=self.ridge)[:, 0]
