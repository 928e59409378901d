"""Optimizers of other libraries, named `torch:AdamW` or `lion_pytorch:Lion`, for a whole model; and pairs of them."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

import normopt
from benchmarks import controls
from benchmarks.harness import PlanError
from normopt.ingredient import nearest

#: What takes matrices only is paired with torch's AdamW for all other tensors, with these options: those of normopt's
#: Muon, whose AdamW has `lr / 2`.
REST: dict[str, Any] = {"optimizer": "torch:AdamW", "lr_ratio": 0.5, "betas": [0.9, 0.95], "weight_decay": 0.0}
MATRICES_ONLY = ("torch:Muon",)
#: Optimizers that ask of every param group whether it is of hidden matrices, in an entry of this name.
FLAGS = {"pytorch_optimizer:Muon": "use_muon"}
#: Optimizers that cannot train the benchmark's model, and why.
REFUSED = {"torch:SparseAdam": "it takes sparse gradients only"}


class Several(Optimizer):
    """Several optimizers that step one after the other, like Muon for matrices and AdamW for the other parameters."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        """The groups of all optimizers, not copies: a scheduler sets the rates of all of them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        """The states of all optimizers."""
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    @state.setter
    def state(self, empty: Mapping[Tensor, Any]) -> None:
        """What torch's constructor sets is not needed."""

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step every optimizer, after one call of the closure; returns the loss."""
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state dicts of all optimizers, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = self._groups()


def hidden(model: nn.Module) -> list[Tensor]:
    """The matrices of hidden layers, which Muon and similar optimizers update."""
    roles = normopt.infer_roles(model)
    return [p for name, p in model.named_parameters() if roles[name].name == "linear"]


def rest(model: nn.Module) -> list[Tensor]:
    """All other parameters."""
    matrices = {id(p) for p in hidden(model)}
    return [p for p in model.parameters() if id(p) not in matrices]


def is_peer(name: str) -> bool:
    """Whether a name is that of another library's optimizer, `library:Class`."""
    return ":" in name and name not in controls.NAMES


def classes(library: str) -> dict[str, type[Optimizer]]:
    """The optimizers of an installed library, by name; torch's are those of `torch.optim`.

    Raises:
        PlanError: if the library is not installed, or has no optimizers.
    """
    try:
        module = importlib.import_module("torch.optim" if library == "torch" else library)
    except (ImportError, ValueError) as error:
        raise PlanError(
            f"--optimizers: {library} cannot be imported ({error}): install it, or choose from another library"
        ) from None
    known = {name: value for name, value in vars(module).items() if inspect.isclass(value) and not name.startswith("_")}
    found = {
        name: cls
        for name, cls in known.items()
        if issubclass(cls, Optimizer) and cls is not Optimizer and not inspect.isabstract(cls)
    }
    if not found:
        raise PlanError(f"--optimizers: {library} has no optimizers")
    return {name: cls for name, cls in found.items() if f"{library}:{name}" not in REFUSED}


def find(name: str) -> type[Optimizer]:
    """The class that `library:Class` names; `PlanError` with the nearest name if there is none."""
    library, _, of_class = name.partition(":")
    if name in REFUSED:
        raise PlanError(f"--optimizers: {name} cannot train the benchmark's model: {REFUSED[name]}")
    known = classes(library)
    if of_class not in known:
        raise PlanError(f"--optimizers: unknown optimizer {name!r}: {nearest(of_class, known)}")
    return known[of_class]


def takes(name: str, option: str) -> bool:
    """Whether the optimizer has an argument of that name."""
    return option in inspect.signature(find(name)).parameters


def make(name: str, model: nn.Module, lr: float, rest_options: Mapping[str, Any] | None, **options: Any) -> Optimizer:
    """The optimizer `library:Class` for a whole model; a weight decay in `options` is for the hidden matrices only.

    With `rest_options` it gets the hidden matrices alone. All other tensors get torch's AdamW with these options, of
    which `optimizer` names another one and `lr_ratio` is its learning rate over `lr`.
    """
    cls: Any = find(name)
    if rest_options is not None:
        others = {"optimizer": REST["optimizer"], "lr_ratio": 1.0, **tuples(rest_options)}
        other, ratio = others.pop("optimizer"), others.pop("lr_ratio")
        of_rest: Any = find(other)
        return Several(cls(hidden(model), lr=lr, **options), of_rest(rest(model), lr=ratio * lr, **others))
    groups: list[dict[str, Any]] = [{"params": hidden(model)}, {"params": rest(model)}]
    if "weight_decay" in options:
        groups[1]["weight_decay"] = 0.0
    if name in FLAGS:
        groups[0][FLAGS[name]], groups[1][FLAGS[name]] = True, False
    several = any(len(group) > 1 for group in groups)  # some optimizers take no groups
    found: Optimizer = cls(groups if several else list(model.parameters()), lr=lr, **options)
    return found


def tuples(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with lists, which is what JSON makes of tuples, as tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
