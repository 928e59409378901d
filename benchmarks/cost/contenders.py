"""The optimizers whose steps are timed: those of normopt, and those of other libraries that are installed."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

import normopt
from benchmarks.harness import imported
from benchmarks.peers import Several, hidden, rest

#: Makes an optimizer from a model; raises ImportError if its library is not installed.
Maker = Callable[[nn.Module], Optimizer]

REFRESH = 10  # steps between two refreshes of SOAP's bases and Shampoo's roots
LARGEST = 4096  # longer sides have no basis in SOAP, so the vocabulary side of an embedding has none


def ours(name: str, **options: Any) -> Maker:
    """An optimizer of normopt for a whole model."""
    return lambda model: normopt.create(name, model, **options)


def torchs(name: str, **options: Any) -> Maker:
    """An optimizer of torch.optim."""
    return lambda model: getattr(torch.optim, name)(model.parameters(), **options)


def peer(package: str, name: str, **options: Any) -> Maker:
    """An optimizer of another package, for all parameters."""

    def make(model: nn.Module) -> Optimizer:
        return cast(Optimizer, imported(package, name)(list(model.parameters()), **options))

    return make


def matrices_and_adamw(package: str, name: str, **options: Any) -> Maker:
    """An optimizer of matrices for the hidden matrices, torch's AdamW for all other parameters."""

    def make(model: nn.Module) -> Several:
        return Several(imported(package, name)(hidden(model), **options), torch.optim.AdamW(rest(model), foreach=True))

    return make


def _muon_of_pytorch_optimizer(model: nn.Module) -> Optimizer:
    from pytorch_optimizer import Muon

    groups = [{"params": hidden(model), "use_muon": True}, {"params": rest(model), "use_muon": False}]
    return cast(Optimizer, Muon(groups))


def _shampoo_of_pytorch_optimizer(model: nn.Module) -> Several:
    from pytorch_optimizer import Shampoo

    own = Shampoo(hidden(model), preconditioning_compute_steps=REFRESH)
    return Several(own, torch.optim.AdamW(rest(model), foreach=True))


#: Contenders by family, normopt's first; each row is compared with the fastest peer of its family.
FAMILIES: dict[str, dict[str, Maker]] = {
    "adamw": {
        "normopt AdamW": ours("adamw"),
        "normopt AdamW, unchecked": ours("adamw", nonfinite="propagate"),
        "torch AdamW": torchs("AdamW"),
        "torch AdamW, foreach": torchs("AdamW", foreach=True),
        "torch AdamW, fused": torchs("AdamW", fused=True),
    },
    "muon": {
        "normopt Muon": ours("muon"),
        "normopt Muon, bfloat16": ours("muon", orthogonalize_dtype=torch.bfloat16),
        "normopt Muon, auto": ours("muon", orthogonalize="auto", orthogonalize_dtype=None),
        "torch Muon + AdamW": matrices_and_adamw("torch.optim", "Muon"),
        "pytorch-optimizer Muon": _muon_of_pytorch_optimizer,
        "timm Muon": peer("timm.optim", "Muon"),
    },
    "soap": {
        "normopt SOAP": ours("soap", precondition_frequency=REFRESH, max_precond_dim=LARGEST),
        "pytorch-optimizer SOAP": peer(
            "pytorch_optimizer", "SOAP", precondition_frequency=REFRESH, max_precondition_dim=LARGEST
        ),
        "heavyball SOAP": peer("heavyball", "SOAP", precondition_frequency=REFRESH, max_precond_dim=LARGEST),
    },
    "shampoo": {
        "normopt Shampoo": ours("shampoo", betas=(0.9, 0.95), graft="adam", preconditioning_frequency=REFRESH),
        "pytorch-optimizer Shampoo + AdamW": _shampoo_of_pytorch_optimizer,
    },
    "prodigy": {
        "normopt Prodigy": ours("prodigy"),
        "prodigyopt Prodigy": peer("prodigyopt", "Prodigy"),
        "pytorch-optimizer Prodigy": peer("pytorch_optimizer", "Prodigy"),
    },
    "lion": {
        "normopt Lion": ours("lion"),
        "lion-pytorch Lion": peer("lion_pytorch", "Lion"),
        "pytorch-optimizer Lion": peer("pytorch_optimizer", "Lion"),
    },
    "adamp": {
        "normopt AdamP": ours("adamp"),
        "adamp AdamP": peer("adamp", "AdamP"),
        "pytorch-optimizer AdamP": peer("pytorch_optimizer", "AdamP"),
    },
    "adafactor": {
        "normopt Adafactor": ours("adafactor"),
        "torch Adafactor": torchs("Adafactor"),
        "torch Adafactor, foreach": torchs("Adafactor", foreach=True),
    },
}


#: Compiled optimizers by family, timed only on demand: compilation takes minutes.
COMPILED = {name: ours(name, compile=True) for name in ("muon", "prodigy", "lion", "adamp", "adafactor")}


def installed(families: list[str], compiled: bool = False) -> Iterator[tuple[str, str, Maker]]:
    """Family, name and maker of every contender whose library is installed."""
    probe = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for family in families:
        for name, maker in FAMILIES[family].items():
            try:
                maker(probe)
            except ImportError:
                continue
            yield family, name, maker
        if compiled and family in COMPILED:
            yield family, f"{next(iter(FAMILIES[family]))}, compiled", COMPILED[family]
