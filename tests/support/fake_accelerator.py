"""Steps on an accelerator that does not exist: its tensors have shapes and no numbers. Prints what each optimizer did.

Reading a number, mixing devices and waiting decompositions are errors. Run as a script: it changes torch globally.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import normopt
from normopt.engine import finite

DEVICE = "imaginary"
WAITING = {"_linalg_eigh", "_linalg_svd", "linalg_qr", "linalg_cholesky_ex", "linalg_lstsq"}


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.name.removeprefix("aten::") in WAITING:
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def model() -> nn.Module:
    with torch.device("meta"):
        net = nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(4, 4, 3), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5))
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(p.shape, device=DEVICE)))
    return net


def captured_steps(name: str) -> str:
    """The first step, which makes the state, and two as in a graph that is being captured; all are measured."""
    net = model()
    try:
        optimizer = normopt.create(name, net, capturable=True)
    except ValueError as error:
        return str(error)
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), 0.1, device=DEVICE)
    for _ in range(3):
        for p in net.parameters():
            p.grad = torch.empty_like(p)
        with NoWaiting(), optimizer.metrics():
            optimizer.step()
    state: list[Tensor] = [x for each in optimizer.state.values() for x in each.values()]
    return "captured" if {x.device.type for x in state} <= {DEVICE} else "state elsewhere"


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend(DEVICE)
    finite.capturing = lambda: True
    outcomes = {}
    for name in normopt.list_optimizers():
        with FakeTensorMode():
            try:
                outcomes[name] = captured_steps(name)
            except Exception as error:
                outcomes[name] = f"{type(error).__name__}: {error}"[:300]
    print(json.dumps(outcomes))
