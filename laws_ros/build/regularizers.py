"""Train a ReLU policy to be cacheable: a differentiable certified gap over boxes, to be added to any torch loss.

    loss = imitation + 0.2 * certified_gap(net, centers, generators).total.mean()

The library answers with affine experts whose certified bound is what linear bound propagation can show (CROWN,
arXiv:1811.00866). Two things make up that bound, and both can be trained away: the bends of ReLUs inside a box, and the
float32 rounding that any order of summation may commit. Adding small boxes to the loss for stability is Xiao et al.
2019 (arXiv:1809.03008) in spirit; here the quantity penalised is the bound itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

UNIT32 = 2.0**-24  # unit roundoff of float32
EXECUTION_TERMS = 3  # roundings on top of one per summed term: as in core.bounds


class Gap(NamedTuple):
    """Certified half-gaps [boxes, outputs]: in the box |affine midline - network| <= relaxation + rounding."""

    relaxation: Tensor
    rounding: Tensor

    @property
    def total(self) -> Tensor:
        return self.relaxation + self.rounding


def certified_gap(net: nn.Sequential, centers: Tensor, generators: Tensor) -> Gap:
    """Certified half-gap of a ReLU network over boxes {center + generators @ zeta, |zeta_i| <= 1}.

    Both lines of a bent ReLU get the chord's slope, so a box costs one column per input and one more: with W a layer's
    matrix, two products W @ [inputs + 1 columns per box] and |W| @ [1 column per box] forward, one row per output back.

    Args:
        net: Linear, ReLU, Linear, ..., Linear.
        centers: [B, n]. generators: [B, n, d], one column per edge of the box (a half-edge); d <= n, as what is
            discrete in an observation has no extent.

    Returns:
        Gap, differentiable in the network's parameters (the count of active terms in the rounding counts as constant).

    Raises:
        TypeError: a layer other than Linear or ReLU, or not alternating.
    """
    linears = [layer for layer in net if isinstance(layer, nn.Linear)]
    pattern = [nn.Linear, nn.ReLU] * len(net)
    if len(net) % 2 == 0 or not all(map(isinstance, net, pattern)):
        raise TypeError(f"certified_gap needs Linear, ReLU, Linear, ..., Linear, found {net}")
    count, inputs = centers.shape
    columns = generators.shape[2] + 1
    middle = torch.cat([generators.permute(1, 0, 2), centers.T[:, :, None]], dim=2)  # [n, B, columns]
    half = torch.zeros_like(centers.T)  # [n, B] what the affine form may be off by
    peak = middle.abs().sum(2)
    terms = centers.new_full((count,), float(inputs))
    bends = []  # per hidden layer: chord, top of the bend and rounding, each [n, B]
    rounding = half
    for layer in linears:
        weight, bias = layer.weight, layer.bias
        magnitude = weight.abs() @ torch.cat([half, peak], dim=1)
        half, spread = magnitude[:, :count], magnitude[:, count:] + bias.abs()[:, None]
        middle = (weight @ middle.reshape(middle.shape[0], -1)).reshape(-1, count, columns)
        middle = torch.cat([middle[..., :-1], middle[..., -1:] + bias[:, None, None]], dim=2)
        rounding = UNIT32 * (terms + EXECUTION_TERMS) * spread
        if layer is linears[-1]:
            break
        swing = middle[..., :-1].abs().sum(2) + half + rounding
        low, high = middle[..., -1] - swing, middle[..., -1] + swing
        bent = (low < 0.0) & (high > 0.0)
        chord = torch.where(bent, high / torch.where(bent, high - low, 1.0), (high > 0.0).to(low.dtype))
        top = torch.where(bent, -chord * low, 0.0)
        bends.append((chord, top, rounding))
        middle = middle * chord[..., None]
        middle = torch.cat([middle[..., :-1], (middle[..., -1] + 0.5 * top)[..., None]], dim=2)
        half = chord * (half + rounding) + 0.5 * top
        peak = high.clamp(min=0.0)
        terms = (high > 0.0).sum(0).to(low.dtype)
    # Back from the outputs: how much every bend and every rounding can move them.
    outputs = linears[-1].out_features
    relaxation, executed = centers.new_zeros(count, outputs), rounding.T
    rows = linears[-1].weight.expand(count, -1, -1)  # [B, outputs, n]
    for layer, (chord, top, error) in zip(reversed(linears[:-1]), reversed(bends), strict=True):
        relaxation = relaxation + 0.5 * torch.einsum("bon,nb->bo", rows.abs(), top)
        rows = rows * chord.T[:, None, :]
        executed = executed + torch.einsum("bon,nb->bo", rows.abs(), error)
        if layer is not linears[0]:
            rows = rows @ layer.weight
    return Gap(relaxation, executed)


def random_boxes(axes: Tensor, half_width: float, generator: torch.Generator) -> Tensor:
    """Generators [B, n, d] of random boxes.

    Args:
        axes: [B, n, d], one scaled axis per column, such as the principal axes of the data around the box's centre
            times their standard deviations.
        half_width: every edge's half-width is drawn uniformly from 0 to this many axis lengths.
    """
    edges = torch.rand((len(axes), axes.shape[2]), generator=generator) * half_width
    return axes * edges[:, None, :].to(axes.device)


class Cacheability:
    """The penalty for any training loop: `loss = loss + penalty(net, x)` in every step.

    docs/cacheable-training.md shows it at work. Weights are for outputs in units of half an action's range.
    """

    def __init__(
        self,
        data: Tensor,
        *,
        half_width: float = 1.0,
        relaxation: float = 0.1,
        rounding: float = 1.0,
        boxes: int = 16,
        every: int = 2,
        seed: int = 0,
    ) -> None:
        """Args:
        data: [N, n] inputs of the network where it will be used, as it sees them (normalised).
        half_width: largest half-width of a box along the data's principal axes, in standard deviations.
        relaxation, rounding: weights of the two parts of the certified gap.
        boxes, every: boxes per penalised step, and how often one comes.
        """
        variances, axes = torch.linalg.eigh(torch.cov(data.T))
        self._axes = axes * variances.clamp(min=0.0).sqrt()
        self._half_width, self._boxes, self._every = half_width, boxes, every
        self._weights = relaxation, rounding
        self._random = torch.Generator().manual_seed(seed)
        self._step = -1

    def __call__(self, net: nn.Sequential, x: Tensor) -> Tensor:
        """The weighted gap of boxes around the first rows of a batch [B, n] of inputs; zero in the steps between."""
        self._step += 1
        if self._step % self._every:
            return x.new_zeros(())
        centers = x[: self._boxes]
        boxes = random_boxes(self._axes.expand(len(centers), -1, -1), self._half_width, self._random)
        gap = certified_gap(net, centers, boxes)
        return self._weights[0] * gap.relaxation.mean() + self._weights[1] * gap.rounding.mean()
