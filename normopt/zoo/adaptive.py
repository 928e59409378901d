"""Learning-rate-free optimizers: Adam with the step sizes of Prodigy and D-Adaptation."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from normopt.constraints.decay import L2, WeightDecay
from normopt.directions.smoothed import Smoothed
from normopt.ingredient import option
from normopt.momentum.averages import EMA
from normopt.norms import Max
from normopt.optimizer import SteepestDescent
from normopt.roles.options import Geometry
from normopt.stepsize.free import DAdaptation
from normopt.stepsize.free import Prodigy as ProdigyStep
from normopt.zoo.common import NO_DECAY, Fixed, Unpack, second

BETAS = (option("betas", 0), option("betas", 1))


class Prodigy(SteepestDescent):
    """Adam that finds its learning rate: :class:`~normopt.stepsize.Prodigy` under the largest-entry norm with memory.

    Arguments and defaults are those of the prodigyopt package (arXiv 2306.06101). For other norms give any optimizer
    ``step_size="prodigy"``: ``Muon(model, lr=1.0, step_size="prodigy")``.

    Args:
        params: parameters, param groups or a model.
        lr: factor on the learning rate that is found, for schedules; 1.
        betas: weights of the past in the averages of the gradient and of its square.
        beta3: weight of the past in the estimate; ``None``: the root of ``betas[1]``.
        eps: added to the root of the second moment, in units of the gradient times ``d``.
        weight_decay: decoupled weight decay, or L2 with ``decouple=False``.
        decouple: see ``weight_decay``.
        use_bias_correction: multiply the step by Adam's bias correction.
        safeguard_warmup: keep a small learning rate at the start from inflating the estimate.
        d0: the first estimate of the learning rate.
        d_coef: factor on the estimate; the argument to tune, if any.
        growth_rate: the most that the estimate may grow by in one step.
        slice_p: estimate from every ``slice_p``-th entry only, to save memory.
        fsdp_in_use: must be False: whole tensors are needed.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.

    Raises:
        ValueError: ``fsdp_in_use``, or a number out of range.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = float("inf"),
        fsdp_in_use: bool = False,
        slice_p: int = 1,
        **common: Unpack[Fixed],
    ) -> None:
        if fsdp_in_use:
            raise ValueError("Prodigy: fsdp_in_use is not supported; pass whole tensors")
        numbers = {
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "beta3": second(betas) ** 0.5 if beta3 is None else beta3,
            "d_coef": d_coef,
            "growth_rate": growth_rate,
        }
        step_size = ProdigyStep(
            d0=d0,
            growth_rate=option("growth_rate"),
            bias_correction=BETAS if use_bias_correction else None,
            beta3=option("beta3"),
            d_coef=option("d_coef"),
            safeguard_warmup=safeguard_warmup,
            slice_p=slice_p,
        )
        super().__init__(
            params,
            lr,
            Smoothed(Max(), option("betas", 1), option("eps"), bias_correction=False),
            EMA(option("betas", 0)),
            step_size,
            (WeightDecay if decouple else L2)(option("weight_decay")),
            options=numbers,
            **common,
        )


class DAdaptAdam(SteepestDescent):
    """Adam that finds its learning rate: :class:`~normopt.stepsize.DAdaptation` under the largest-entry norm.

    Arguments and defaults are those of the dadaptation package without ``log_every`` (arXiv 2301.07733); its group
    option ``layer_scale`` is ``radius`` here.

    Args:
        params: parameters, param groups or a model.
        lr: factor on the learning rate that is found, for schedules; 1.
        betas: weights of the past in the averages of the gradient and of its square.
        eps: added to the root of the second moment.
        weight_decay: L2 regularization, or decoupled weight decay with ``decouple``.
        decouple: see ``weight_decay``.
        use_bias_correction: multiply the step by Adam's bias correction.
        d0: the first estimate of the learning rate.
        growth_rate: the most that the estimate may grow by in one step.
        fsdp_in_use: must be False: whole tensors are needed.
        radius: how far these tensors go beside those of other param groups.
        common: ``geometry``, ``overrides`` and ``maximize`` of :class:`~normopt.SteepestDescent`.

    Raises:
        ValueError: ``fsdp_in_use``, or a number out of range.
    """

    geometry: ClassVar[Geometry] = NO_DECAY

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = False,
        use_bias_correction: bool = False,
        d0: float = 1e-6,
        growth_rate: float = float("inf"),
        fsdp_in_use: bool = False,
        radius: float = 1.0,
        **common: Unpack[Fixed],
    ) -> None:
        if fsdp_in_use:
            raise ValueError("DAdaptAdam: fsdp_in_use is not supported; pass whole tensors")
        numbers = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "growth_rate": growth_rate}
        step_size = DAdaptation(
            d0=d0,
            growth_rate=option("growth_rate"),
            radius=option("radius"),
            bias_correction=BETAS if use_bias_correction else None,
            beta=option("betas", 1),
        )
        super().__init__(
            params,
            lr,
            Smoothed(Max(), option("betas", 1), option("eps"), bias_correction=False),
            EMA(option("betas", 0)),
            step_size,
            (WeightDecay if decouple else L2)(option("weight_decay")),
            options={**numbers, "radius": radius},
            **common,
        )
