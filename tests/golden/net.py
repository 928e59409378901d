"""The net of the redesign: every optimizer and ingredient, 12 steps at fixed seeds, compared with a recording.

``python tests/golden/net.py record FILE`` writes weights and state of every case; ``check FILE`` compares them: bit for
bit, or with ``--tolerance 1e-5`` to rounding on other machines; ``calls`` counts the Python calls of a warm step.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import normopt

STEPS = 12
Case = tuple[list[Tensor], torch.optim.Optimizer, nn.Module]


class Net(nn.Module):
    """An embedding, linear layers tall and wide, a convolution, a stack of two, a norm, a scalar and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.up, self.gate, self.down = nn.Linear(6, 12), nn.Linear(6, 12, bias=False), nn.Linear(12, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm, self.gain = nn.LayerNorm(6), nn.Parameter(torch.ones(()))
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        x = x + self.conv(x.mT).mT * self.gain
        x = self.norm(x + self.down(torch.tanh(self.up(x)) * self.gate(x)))
        return self.head(x)


def model(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(1)
    return Net().to(dtype)


def spare() -> dict[str, dict[str, Any]]:
    """Arguments of SteepestDescent for ingredients, each as default as it can be."""
    from normopt import Column, EMA, Max, Smoothed, Spectral

    needs: dict[str, Any] = {"Transposed": lambda cls: cls(normopt.RowBound()), "Ball": lambda cls: cls("column")}
    needs |= {"Smoothed": lambda cls: cls(Max()), "Chain": lambda cls: cls(Spectral(), Column())}
    found: dict[str, dict[str, Any]] = {}
    from normopt.ingredient import choices

    kinds = {"norm": normopt.Direction, "momentum": normopt.Momentum, "step_size": normopt.StepSize}
    for argument, kind in {**kinds, "constraint": normopt.constraints.Constraint}.items():
        for name, cls in sorted(choices(kind).items()):
            try:
                made = needs.get(cls.__name__, lambda cls: cls())(cls)
            except TypeError:
                made = None
            if made is None:
                made = by_hand(cls.__name__, cls)
            if made is not None and not (argument == "norm" and isinstance(made, normopt.Momentum)):
                found[f"{argument}:{NAMES.get(name, name)}"] = {argument: made}
    found["step_size:dual+ema"] = {"step_size": "dual", "momentum": EMA(0.9), "norm": "spectral"}
    found["step_size:prodigy+smoothed"] = {"step_size": "prodigy", "norm": Smoothed(Max()), "lr": 1.0}
    found["step_size:d-adaptation+smoothed"] = {"step_size": "dadaptation", "norm": Smoothed(Max()), "lr": 1.0}
    found["momentum:recursive+storm"] = {"momentum": normopt.Recursive(None), "step_size": "storm", "norm": "euclidean"}
    found["constraint:soft"] = {"norm": Spectral(), "constraint": normopt.SoftSpectralCap(radius=4.0)}
    return found


#: New names of the same ingredients, so that both are one case.
NAMES = {"look-ahead": "lion-momentum"}


def by_hand(name: str, cls: type) -> Any:
    made: dict[str, Callable[[], Any]] = {
        "Grafted": lambda: normopt.Grafted(normopt.Spectral(), normopt.Max()),
        "Rotated": lambda: normopt.Rotated(normopt.Max(), normopt.Eigenbasis()),
        "Blocked": lambda: normopt.Blocked(normopt.Spectral(), 4),
        "Decayed": lambda: normopt.Decayed(normopt.Max(), 0.1),
        "Clipped": lambda: normopt.Clipped(normopt.Max(), 1.0),
        "Complement": lambda: normopt.Complement(normopt.Spectral()),
    }
    return made[name]() if name in made else None


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    def zoo(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[], Case]:
        def make() -> Case:
            net = model(dtype)
            o = normopt.create(name, net, **options)
            return list(net.parameters()), o, net

        return make

    def matrices(name: str, **options: Any) -> Callable[[], Case]:
        def make() -> Case:
            net = model()
            weights = [p for p in net.parameters() if p.ndim == 2]
            return weights, normopt.create(name, weights, **options), net

        return make

    def plain(**options: Any) -> Callable[[], Case]:
        def make() -> Case:
            net = model()
            weights = [p for p in net.parameters() if p.ndim == 2]
            return weights, normopt.SteepestDescent(weights, **options), net

        return make

    names = (
        "adagrad adam adamax adamh adamp adamuon adamw adafactor ademamix aro asgo auon columndescent dadaptadam dasgo "
    )
    names += (
        "dion hybridauon klshampoo lamb lars lion muon muonh muonplus muonplusplus nadam nap normalizedsgd normuon "
    )
    names += "novograd nucleardescent polargrad prodigy rmsprop rowdescent scale scion sgd sgdp shampoo signsgd signum "
    names += "sinkgd soap spectraldescent stormplus swan"
    for name in names.split():
        yield f"zoo:{name}", zoo(name)
        yield f"bf16:{name}", zoo(name, torch.bfloat16)
        yield f"matrices:{name}", matrices(name, maximize=True)
        if name not in ("stormplus",):
            yield f"state_dtype:{name}", zoo(name, state_dtype="bfloat16")
    for name in ("muon", "adamw", "soap", "lion", "scion"):
        yield f"prodigy:{name}", zoo(name, lr=1.0, step_size="prodigy")
        yield f"bounds:{name}", zoo(name, overrides={"up.weight": {"bounds": "RowBound(radius=0.5)"}})
        yield f"kahan:{name}", zoo(name, torch.bfloat16, overrides={"*": {"bounds": "KahanSum()"}})
        yield f"stochastic:{name}", zoo(name, torch.bfloat16, overrides={"*": {"bounds": "StochasticRounding()"}})
    for name in ("adamw", "muon", "normuon"):
        yield f"cautious:{name}", zoo(name, cautious=True, weight_decay=0.1)
    for name, options in spare().items():
        yield name, plain(**options)


def run(make: Callable[[], Case]) -> dict[str, Tensor]:
    weights, optimizer, net = make()
    noise = torch.Generator().manual_seed(2)
    dtype = weights[0].dtype
    for step in range(STEPS):
        tokens = torch.randint(0, 11, (4, 9), generator=noise)

        def closure() -> Tensor:
            net.zero_grad()
            logits = net(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            loss.backward()
            if step == 5:
                net.down.bias.grad = None
            return loss

        optimizer.step(closure)
    assert weights[0].dtype == dtype
    found = {f"w{i}": p.detach().clone() for i, p in enumerate(weights)}
    for i, p in enumerate(weights):
        for key, value in optimizer.state[p].items():
            found[f"s{i}.{key}"] = value.detach().clone()
    for i, group in enumerate(optimizer.param_groups):
        found |= {f"g{i}.{key}": x.clone() for key, x in group.items() if isinstance(x, Tensor)}
    return found


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, make in cases():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found[name] = run(make)
            except (ValueError, TypeError) as error:  # a combination that is refused must stay so
                found[name] = f"{type(error).__name__}"
    return found


def same(a: Any, b: Any, tolerance: float) -> str:
    if isinstance(a, str) or isinstance(b, str):
        return (
            "" if a == b else f"{a if isinstance(a, str) else 'ran'} before, {b if isinstance(b, str) else 'runs'} now"
        )
    if a.keys() != b.keys():
        return f"keys {sorted(a.keys() ^ b.keys())}"
    for key in a:
        x, y = a[key], b[key]
        if x.dtype != y.dtype or x.shape != y.shape:
            return f"{key}: {x.dtype} {tuple(x.shape)} before, {y.dtype} {tuple(y.shape)} now"
        if torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)):
            continue
        worst = ((x.double() - y.double()).abs().max() / x.double().abs().max().clamp(min=1e-30)).item()
        if not worst <= tolerance:
            return f"{key}: differs by {worst:.2g}"
    return ""


def calls(name: str, **options: Any) -> tuple[int, int, int]:
    """Python calls of a warm step on two 8 x 6 matrices, in how many files, and changes of file."""
    weights = [nn.Parameter(torch.randn(8, 6)) for _ in range(2)]
    optimizer = normopt.create(name, weights, **options)
    for p in weights:
        p.grad = torch.randn(8, 6)
    for _ in range(3):
        optimizer.step()
    seen: list[str] = []

    def trace(frame: Any, event: str, _: Any) -> None:
        if event == "call" and "normopt" in frame.f_code.co_filename:
            seen.append(frame.f_code.co_filename)

    sys.setprofile(trace)
    optimizer.step()
    sys.setprofile(None)
    return len(seen), len(set(seen)), sum(a != b for a, b in zip(seen, seen[1:], strict=False))


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["record", "check", "calls"])
    parser.add_argument("file", nargs="?", default="")
    parser.add_argument("--tolerance", type=float, default=0.0)
    given = parser.parse_args()
    if given.what == "calls":
        for name in ("muon", "adamw", "sgd"):
            print(name, "calls, files, file changes:", *calls(name))
    elif given.what == "record":
        found = everything()
        torch.save(found, given.file)
        print(f"{len(found)} cases recorded, {sum(isinstance(x, str) for x in found.values())} of them refused")
    else:
        before, now = torch.load(given.file), everything()
        bad = {name: same(before[name], now.get(name, "gone"), given.tolerance) for name in before}
        bad = {name: why for name, why in bad.items() if why}
        print(*(f"{name}: {why}" for name, why in bad.items()), sep="\n")
        print(f"{len(before)} cases, {len(bad)} differ; new: {sorted(now.keys() - before.keys())}")
        sys.exit(bool(bad))


if __name__ == "__main__":
    main()
