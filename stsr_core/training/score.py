"""Scores as a loss: what makes members is trained on, end to end, towards the least fair CRPS of its members.

A denoiser that was distilled makes a member in two evaluations, few enough for gradients to go back through both, and
through conservation. Until then each evaluation learned its own part, and what they make of it together was left to
chance; here whole members are compared with the truth, as users do. The CRPS of amounts alone would leave drizzle where
rain is possible, and noise that no score of a single cell sees; so light rain counts by logarithms, and structure by
differences between neighbouring cells and steps.

The result lies half way back to where that training began. On validation windows this keeps two thirds of what it
gains at (25,6), (8,3) and (10,1), and little of the 1 % that it loses at (1,3) and (1,6).

Source: training by the (almost) fair CRPS, Lang et al., arXiv 2412.15832; of several aspects, Lang et al.,
arXiv 2506.10868. Every part is a proper score, and so is their sum (Gneiting and Raftery 2007, doi
10.1198/016214506000001437).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stsr_core.checkpoint import Served
from stsr_core.conservation import block_sums, conserve, threshold
from stsr_core.diffusion import reached_by_step, sampling_angles
from stsr_core.factors import Factor, FactorConfiguration
from stsr_core.networks.transform import to_amount, to_signed_amount
from stsr_core.training.losses import Loss, Residuals, residual_loss

RATE_SHARE = 0.3  # of the learning rate of the denoiser
START_SHARE = 0.5  # of the weights it begins with in the result, see `stage.Stage.weights`
LEAK = 0.1  # share of the gradient that passes where amounts are cut off, else cells that dried out stay so
# Of the mean square of what transformed members lie below LEAST_TRANSFORMED, which draws them back; drawn all the way
# to zero, cells that should be dry have drizzle.
BELOW_WEIGHT = 0.1
LEAST_TRANSFORMED = -2.0
LARGEST_TRANSFORMED = 8.0  # of members, so that gradients stay finite; 600 mm
DRY_MM = 1e-4  # amount below which cells and blocks count as dry
LARGEST_GAIN = 50.0  # that gradients are multiplied by
LIGHT_SCALES = ((0.2, 0.4), (0.05, 0.3))  # of the logarithms of light rain [mm], and their weights
# Of differences between neighbouring cells; with 1 members had a quarter of the radar's power at 3 km.
ACROSS_WEIGHT = 4.0
CHANGE_WEIGHT = 0.25  # of changes from step to step
RAIN_MM, RAIN_POWER = 0.3, 0.7  # scores of amounts count by 1 / (RAIN_MM + mean of the patch) ** RAIN_POWER


def score_loss(mean: nn.Module, served: Mapping[Factor, Served], scale_mm: float) -> Loss:
    """Return the loss of a distilled denoiser around a trained mean network: scores of two members of every patch.

    Args:
        mean: the mean network.
        served: how the denoiser is served, by factor.
        scale_mm: constant of the transform.
    """

    scales = {factor: how.residual_scale for factor, how in served.items()}
    return residual_loss(mean, scales, partial(_scored, served, scale_mm))


def _scored(
    served: Mapping[Factor, Served],
    scale_mm: float,
    network: nn.Module,
    residuals: Residuals,
    generator: torch.Generator,
) -> Tensor:
    configuration, expected = residuals.configuration, residuals.expected
    factor, how = configuration.factor, served[configuration.factor]
    truth = to_amount((expected + how.residual_scale * residuals.values)[:, :, 0], scale_mm)
    coarse = block_sums(truth, factor) / factor.space**2
    made = [_residual(network, residuals, how.evaluations, generator) for _ in range(2)]
    transformed = [(expected + how.width * r)[:, :, 0] for r in made]
    if not all(x.isfinite().all() for x in transformed):
        return torch.stack(transformed).sum() * math.nan  # amounts that are not finite cannot be conserved
    first, second = (conserved(_amounts(x, scale_mm), coarse, configuration) for x in transformed)
    below = (LEAST_TRANSFORMED - torch.stack(transformed)).clamp(min=0.0).square().mean()
    return scores(first, second, truth) + BELOW_WEIGHT * below


def _residual(network: nn.Module, residuals: Residuals, evaluations: int, generator: torch.Generator) -> Tensor:
    """Residual of a member, as `diffusion.sample` with steps of first order makes it, for gradients to pass."""
    x = residuals.noise(generator)
    for angle, following in itertools.pairwise(sampling_angles(residuals.configuration.beta, evaluations)):
        levels = torch.full((len(x),), angle, device=x.device)
        if x.is_cuda:  # memory for one evaluation at a time; CPUs have it for all, and no time for doing it twice
            found = checkpoint(residuals.denoised, network, x, levels, use_reentrant=False)
        else:
            found = residuals.denoised(network, x, levels)
        x = reached_by_step(x, found, angle, following)
    return x


def _cut(x: Tensor) -> Tensor:
    """max(x, 0), with LEAK of the gradient where x is below 0."""
    return torch.where(x > 0, x, LEAK * (x - x.detach()))


class _NotToLess(torch.autograd.Function):
    """x; where it is not above 0, gradients pass towards more only.

    Nothing holds cells that are dry already, and networks that are driven to less there drift till they fail.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return torch.where(x > 0, gradients[0], gradients[0].clamp(max=0.0))


def _amounts(transformed: Tensor, scale_mm: float) -> Tensor:
    """Amounts [mm per fine step], below 0 where dry, with LEAK of the gradient there."""
    held: Tensor = _NotToLess.apply(transformed)  # type: ignore[no-untyped-call]
    return to_signed_amount((_cut(held) + held.detach().clamp(max=0.0)).clamp(max=LARGEST_TRANSFORMED), scale_mm)


def conserved(fine: Tensor, coarse: Tensor, configuration: FactorConfiguration) -> Tensor:
    """Amounts as `conservation.conserve` makes them, for gradients to pass.

    They pass through the threshold of f and the total of every block. The smooth gain and what goes from capped cells
    to others are taken as they are.

    Args:
        fine: amount [mm per fine step], (B, T*t, Y*s, X*s), below 0 where dry.
        coarse: amount [mm per coarse step], (B, T, Y, X).
        configuration: of the factor.
    """
    factor, function = configuration.factor, configuration.conservation
    above = _cut(fine - threshold(coarse, factor, function))
    with torch.no_grad():
        wanted = conserve(fine, coarse, factor, function)
        of_block = _over_blocks(_ratio(coarse, above, factor), factor)  # for dry cells, which have no gain of their own
        gain = torch.where(above > DRY_MM, wanted / above.clamp(min=DRY_MM), of_block).clamp(max=LARGEST_GAIN)
        rest = wanted - gain * above
    result = gain * above + rest
    return result * _over_blocks(_ratio(coarse, result, factor), factor)


def _ratio(coarse: Tensor, fine: Tensor, factor: Factor) -> Tensor:
    """Coarse amounts over those of blocks, 1 where these are dry, (B, T, Y, X)."""
    total = block_sums(fine, factor) / factor.space**2
    return torch.where(total > DRY_MM, coarse / total.clamp(min=DRY_MM), 1.0)


def _over_blocks(coarse: Tensor, factor: Factor) -> Tensor:
    """Repeat values (B, T, Y, X) over the cells of their blocks."""
    for axis, times in ((-3, factor.time), (-2, factor.space), (-1, factor.space)):
        coarse = coarse.repeat_interleave(times, dim=axis)
    return coarse


def fair_crps(first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
    """Fair CRPS of two members cell by cell, in their unit.

    Source: Ferro 2014, doi 10.1002/qj.2270; scoringrules has no gradient of it for torch that is as short.
    """
    return 0.5 * ((first - truth).abs() + (second - truth).abs() - (first - second).abs())


def scores(first: Tensor, second: Tensor, truth: Tensor) -> Tensor:
    """Weighted sum of fair CRPS of two members (B, T, H, W) against the truth [mm per fine step].

    Of amounts and of their differences from cell to cell and step to step, relative to the rain of a patch; and of
    logarithms, which tell light rain from none.
    """
    fields = first, second, truth
    rain = (RAIN_MM + truth.mean(dim=(1, 2, 3))) ** RAIN_POWER
    parts = fair_crps(*fields).mean(dim=(1, 2, 3))
    for axis, weight in ((-1, ACROSS_WEIGHT / 2), (-2, ACROSS_WEIGHT / 2), (-3, CHANGE_WEIGHT)):
        if truth.shape[axis] > 1:
            parts = parts + weight * fair_crps(*(f.diff(dim=axis) for f in fields)).mean(dim=(1, 2, 3))
    loss = (parts / rain).mean()
    for scale, weight in LIGHT_SCALES:
        loss = loss + weight * fair_crps(*((f / scale).log1p() for f in fields)).mean()
    return loss
