"""The published optimizers, each a named choice of ingredients, and what declares one's own."""

import inspect
from fnmatch import fnmatch
from typing import Any

from torch import nn
from torch.optim.optimizer import ParamsT

from normopt.ingredient import nearest
from normopt.optimizer import SteepestDescent
from normopt.zoo.adam import Adafactor, Adagrad, Adam, Adamax, AdamW, AdEMAMix, NAdam, RMSprop
from normopt.zoo.base import DeclaredOptimizer, FixedStepOptimizer, arg
from normopt.zoo.blocks import AdamMini, SubsetNorm
from normopt.zoo.hyperball import SPEL, AdamH, MuonH, NaP
from normopt.zoo.layerwise import LAMB, LARS, NovoGrad
from normopt.zoo.learning_rate_free import DAdaptAdam, Prodigy
from normopt.zoo.matrices import FixedStepMatrixOptimizer, MatrixOptimizer
from normopt.zoo.muon import Muon, MuonPlusPlus
from normopt.zoo.muon_chains import RMNP, AdaGO, Muon2, MuonEq, OLion
from normopt.zoo.muon_variants import AdaMuon, AuON, Aurora, Dion, HybridAuON, MuonPlus, NorMuon, PolarGrad
from normopt.zoo.norm_descent import ColumnDescent, NormalizedSGD, NuclearDescent, RowDescent, SpectralDescent
from normopt.zoo.one_sided import COSMOS, MOSO
from normopt.zoo.scale_invariant import SGDP, AdamP
from normopt.zoo.scion import Scion
from normopt.zoo.sgd import SGD, STORMPlus
from normopt.zoo.shampoo import ASGO, DASGO, SOAP, KLShampoo, Shampoo, SPlus
from normopt.zoo.sign import Lion, SignSGD, Signum
from normopt.zoo.spectra import SPECTRA, HTMuon, NuMuon
from normopt.zoo.stateless import ARO, SCALE, SWAN, SinkGD

__all__ = [
    "ARO",
    "ASGO",
    "COSMOS",
    "DASGO",
    "LAMB",
    "LARS",
    "MOSO",
    "RMNP",
    "SCALE",
    "SGD",
    "SGDP",
    "SOAP",
    "SPECTRA",
    "SPEL",
    "SWAN",
    "AdEMAMix",
    "AdaGO",
    "AdaMuon",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamH",
    "AdamMini",
    "AdamP",
    "AdamW",
    "Adamax",
    "AuON",
    "Aurora",
    "ColumnDescent",
    "DAdaptAdam",
    "DeclaredOptimizer",
    "Dion",
    "FixedStepMatrixOptimizer",
    "FixedStepOptimizer",
    "HTMuon",
    "HybridAuON",
    "KLShampoo",
    "Lion",
    "MatrixOptimizer",
    "Muon",
    "Muon2",
    "MuonEq",
    "MuonH",
    "MuonPlus",
    "MuonPlusPlus",
    "NAdam",
    "NaP",
    "NorMuon",
    "NormalizedSGD",
    "NovoGrad",
    "NuMuon",
    "NuclearDescent",
    "OLion",
    "PolarGrad",
    "Prodigy",
    "RMSprop",
    "RowDescent",
    "SPlus",
    "STORMPlus",
    "Scion",
    "Shampoo",
    "SignSGD",
    "Signum",
    "SinkGD",
    "SpectralDescent",
    "SubsetNorm",
    "arg",
    "create",
    "list_optimizers",
]


def list_optimizers(pattern: str = "*") -> list[str]:
    """The names that :func:`create` takes, those of user-defined subclasses included.

    Args:
        pattern: a glob, in any case.
    """
    return sorted(name for name in SteepestDescent.registry if fnmatch(name, pattern.lower()))


def create(name: str, model: nn.Module | ParamsT, **options: Any) -> SteepestDescent:
    """The optimizer of that name for a whole model (or parameters): ``create("muon", model, lr=0.02)``.

    Args:
        name: one of :func:`list_optimizers`, in any case.
        model: a module, of which every tensor is treated by its role, or parameters.
        options: arguments of the optimizer's class.

    Raises:
        ValueError: unknown name; the message holds the nearest one.
        TypeError: an argument that the optimizer's class does not have; the message holds the nearest one.
    """
    if not isinstance(name, str):
        raise TypeError(f"create(name, model): name must be one of list_optimizers(), got {type(name).__name__}")
    if name.lower() not in SteepestDescent.registry:
        raise ValueError(f"unknown optimizer {name!r}; {nearest(name.lower(), SteepestDescent.registry)}")
    cls = SteepestDescent.registry[name.lower()]
    arguments = inspect.signature(cls).parameters
    takes_any = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values())
    for option in () if takes_any else options.keys() - arguments.keys():
        raise TypeError(f"{cls.__name__} has no argument {option!r}; {nearest(option, arguments)}")
    return cls(model, **options)
