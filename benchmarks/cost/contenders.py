"""The optimizers whose steps are timed: those of normopt, and those of other libraries that are installed."""

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import normopt
from benchmarks import peers
from benchmarks.harness import imported

#: What is optimized: a model, or a plain list of matrices, all of which are hidden ones.
Parameters = nn.Module | list[nn.Parameter]
#: Makes an optimizer; raises ImportError if its library is not installed.
Maker = Callable[[Parameters], Optimizer]

REFRESH = 10  # steps between two refreshes of SOAP's bases and Shampoo's roots
REFRESHED = ("soap", "shampoo")  # families whose steps are not all alike, therefore
SCALE, SIDE = "scale", 16  # the set that is measured at several numbers of matrices, and their sides
LARGEST = 4096  # longer sides have no basis in SOAP, so the vocabulary side of an embedding has none

# Options that several libraries name alike; what differs by name is beside each contender.
SGD = {"lr": 1e-2, "momentum": 0.9}
MUON = {"lr": 1e-3, "weight_decay": 0.1}
ADAMW_OF_MUON = {"lr": 5e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}  # what normopt's Muon has at `lr` 1e-3
NORMUON = {"lr": 1e-3}
# A distance that stays: it would overflow, as the same few gradients come again and again.
PRODIGY = {"d0": 1e-3, "d_coef": 1e-12}


def tensors(parameters: Parameters) -> list[Tensor]:
    """All parameters."""
    return list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)


def hidden(parameters: Parameters) -> list[Tensor]:
    """The hidden matrices: of a model by their roles, of a list all."""
    return peers.hidden(parameters) if isinstance(parameters, nn.Module) else tensors(parameters)


def rest(parameters: Parameters) -> list[Tensor]:
    """All other parameters."""
    return peers.rest(parameters) if isinstance(parameters, nn.Module) else []


def ours(name: str, **options: Any) -> Maker:
    """An optimizer of normopt."""
    return lambda parameters: normopt.create(name, parameters, **options)


def peer(package: str, name: str, **options: Any) -> Maker:
    """An optimizer of another package, for all parameters."""
    return lambda parameters: cast(Optimizer, imported(package, name)(tensors(parameters), **options))


def torchs(name: str, **options: Any) -> Maker:
    """An optimizer of torch.optim."""
    return peer("torch.optim", name, **options)


def matrices_and_adamw(package: str, name: str, adamw: dict[str, Any], **options: Any) -> Maker:
    """An optimizer of matrices for the hidden matrices, torch's fused AdamW for all other parameters, if any."""

    def make(parameters: Parameters) -> Optimizer:
        own = cast(Optimizer, imported(package, name)(hidden(parameters), **options))
        others = rest(parameters)
        return peers.Several(own, torch.optim.AdamW(others, fused=True, **adamw)) if others else own

    return make


def grouped(package: str, name: str, matrices: dict[str, Any], others: dict[str, Any], **options: Any) -> Maker:
    """An optimizer whose param groups say with `matrices` and `others` whether they are of hidden matrices."""

    def make(parameters: Parameters) -> Optimizer:
        groups = [{"params": hidden(parameters), **matrices}, {"params": rest(parameters), **others}]
        chosen = [group for group in groups if group["params"]]
        return cast(Optimizer, imported(package, name)(chosen, **options))

    return make


def flagged(name: str, **options: Any) -> Maker:
    """An optimizer of pytorch-optimizer that has such param groups."""
    return grouped("pytorch_optimizer", name, {"use_muon": True}, {"use_muon": False}, **options)


def of_dion(name: str, **options: Any) -> Maker:
    """An optimizer of microsoft/dion, with as many products as those of the others, and AdamW for other tensors."""
    adamw = {"algorithm": "adamw", "lr": 5e-4, "betas": (0.9, 0.95)}
    return grouped("dion", name, {}, adamw, use_polar_express=False, **options)


def _scion_of_pytorch_optimizer(parameters: Parameters) -> Optimizer:
    """With the norms of normopt's Scion for each role: columns of embeddings, signs in the head, RMS of vectors."""
    scion, norms = imported("pytorch_optimizer", "SCION"), imported("pytorch_optimizer.optimizer.scion", "LMONorm")
    by_role: dict[str, dict[str, Any]] = {
        "linear": {"norm_type": norms.SPECTRAL},
        "embedding": {"norm_type": norms.COL, "norm_kwargs": {"transpose": True}},
        "unembedding": {"norm_type": norms.SIGN, "scale": 60.0},
        "vector": {"norm_type": norms.BIAS},
    }
    if not isinstance(parameters, nn.Module):
        return cast(Optimizer, scion(parameters, **by_role["linear"]))
    roles = {name: role.name for name, role in normopt.infer_roles(parameters).items()}
    members = {role: [p for name, p in parameters.named_parameters() if roles[name] == role] for role in by_role}
    return cast(Optimizer, scion([{"params": members[role], **by_role[role]} for role in by_role if members[role]]))


#: Contenders by family, normopt's default first; each is compared with the fastest peer of its family.
FAMILIES: dict[str, dict[str, Maker]] = {
    "adamw": {
        "normopt AdamW": ours("adamw"),
        "normopt AdamW, unchecked": ours("adamw", nonfinite="propagate"),
        "torch AdamW": torchs("AdamW"),
        "torch AdamW, foreach": torchs("AdamW", foreach=True),
        "torch AdamW, fused": torchs("AdamW", fused=True),
    },
    "sgd": {
        "normopt SGD": ours("sgd", **SGD),
        "normopt SGD, unchecked": ours("sgd", **SGD, nonfinite="propagate"),
        "torch SGD": torchs("SGD", **SGD),
        "torch SGD, foreach": torchs("SGD", **SGD, foreach=True),
        "torch SGD, fused": torchs("SGD", **SGD, fused=True),
        "pytorch-optimizer SGDW": peer("pytorch_optimizer", "SGDW", **SGD),
    },
    "signum": {
        "normopt Signum": ours("signum"),
        "pytorch-optimizer SignSGD": peer("pytorch_optimizer", "SignSGD"),
    },
    "rmsprop": {
        "normopt RMSprop": ours("rmsprop"),
        "torch RMSprop": torchs("RMSprop"),
        "torch RMSprop, foreach": torchs("RMSprop", foreach=True),
    },
    "muon": {
        "normopt Muon": ours("muon", **MUON),
        "normopt Muon, bfloat16": ours("muon", **MUON, orthogonalize_dtype=torch.bfloat16),
        "normopt Muon, auto": ours("muon", **MUON, orthogonalize="auto", orthogonalize_dtype=None),
        "torch Muon + fused AdamW": matrices_and_adamw("torch.optim", "Muon", ADAMW_OF_MUON, **MUON),
        "pytorch-optimizer Muon": flagged("Muon", **MUON, adamw_lr=5e-4),
        "timm Muon": peer("timm.optim", "Muon"),
        "dion Muon": of_dion("Muon", **MUON, nesterov=True),
        "emerging-optimizers Muon + fused AdamW": matrices_and_adamw(
            "emerging_optimizers.orthogonalized_optimizers",
            "Muon",
            ADAMW_OF_MUON,
            **MUON,
            nesterov=True,
            coefficient_type="simple",
            scale_mode="shape_scaling",
        ),
    },
    "normuon": {
        "normopt NorMuon": ours("normuon", **NORMUON, aux_lr=5e-4),
        "pytorch-optimizer NorMuon": flagged("NorMuon", **NORMUON, adamw_lr=5e-4),
        "dion NorMuon": of_dion("NorMuon", **NORMUON),
    },
    "scion": {
        "normopt Scion": ours("scion"),
        "pytorch-optimizer SCION": _scion_of_pytorch_optimizer,
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
        "pytorch-optimizer Shampoo + fused AdamW": matrices_and_adamw(
            "pytorch_optimizer", "Shampoo", {}, preconditioning_compute_steps=REFRESH
        ),
    },
    "prodigy": {
        "normopt Prodigy": ours("prodigy", **PRODIGY),
        "prodigyopt Prodigy": peer("prodigyopt", "Prodigy", **PRODIGY),
        "pytorch-optimizer Prodigy": peer("pytorch_optimizer", "Prodigy", **PRODIGY),
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
        "pytorch-optimizer AdaFactor": peer(
            "pytorch_optimizer", "AdaFactor", lr=1e-2, betas=(None, 0.999), relative_step=False
        ),
        "transformers Adafactor": peer(
            "transformers.optimization", "Adafactor", lr=1e-2, relative_step=False, scale_parameter=True
        ),
    },
}


#: Compiled optimizers by family, timed only on demand: compilation takes minutes.
COMPILED = {name: ours(name, compile=True) for name in ("muon", "prodigy", "lion", "adamp", "adafactor")}


#: Those of the contenders that are also timed as a CUDA graph, where there is a GPU.
GRAPHED = ("normopt AdamW", "normopt SGD", "normopt Muon", "normopt Lion", "torch AdamW, fused", "torch SGD, fused")

#: Ordinary steps before a CUDA graph records one: they make the state, and measure products.
BEFORE_CAPTURE = 3


class Replay:
    """A step that a CUDA graph records once and replays from then on; gradients stay where they are."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step, self.left = step, BEFORE_CAPTURE
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.left:
            self.left -= 1
            current, own = torch.cuda.current_stream(), torch.cuda.Stream()
            own.wait_stream(current)
            with torch.cuda.stream(own):
                self.step()
            current.wait_stream(own)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
        self.graph.replay()


def as_graph(maker: Maker) -> Maker:
    """The same optimizer, its steps replayed by a CUDA graph."""

    def make(parameters: Parameters) -> Optimizer:
        optimizer = maker(parameters)
        for group in optimizer.param_groups:
            group["capturable"] = True
        vars(optimizer)["step"] = Replay(optimizer.step)
        return optimizer

    return make


def library_of(name: str) -> str:
    """The library of a contender, the first word of its name: "torch" of "torch AdamW, fused"."""
    return name.partition(" ")[0]


def installed(families: list[str], compiled: bool = False, graphs: bool = False) -> Iterator[tuple[str, str, Maker]]:
    """Family, name and maker of every contender whose library is installed; on demand compiled ones and graphs."""
    for family in families:
        for name, maker in FAMILIES[family].items():
            try:
                maker([nn.Parameter(torch.zeros(4, 4))])
            except ImportError:
                continue
            yield family, name, maker
            if graphs and name in GRAPHED:
                yield family, f"{name}, graph", as_graph(maker)
        if compiled and family in COMPILED:
            yield family, f"{next(iter(FAMILIES[family]))}, compiled", COMPILED[family]
