"""SteepestDescent: the only optimizer loop. Everything else in the library is an ingredient of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from normopt.batch import Batch, partition
from normopt.constraints import Constraint
from normopt.ingredient import Context, Stage, nearest, parse
from normopt.momentum import Momentum, NoMomentum
from normopt.roles import Geometry, entry, overlaid, param_groups, with_beta
from normopt.rule import INGREDIENTS, Rule
from normopt.stepsize import Shared, StepSize, double
from normopt.view import View

#: Param-group entries that are no options of an ingredient: ours, and those that torch's schedulers and users write.
_GROUP_KEYS = {"params", "param_names", "lr", "maximize", "role", "reasons", "rule", "name", "initial_lr", "lr_scale"}
_GROUP_KEYS |= {f"{bound}_{name}" for bound in ("base", "max", "min") for name in ("lr", "momentum")}


@dataclass
class _Move:
    """What one batch is about to do, known step by step: the averaged gradient and the direction come last."""

    batch: Batch
    context: Context
    averaged: Tensor = field(default_factory=lambda: torch.empty(0))
    direction: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def step_size(self) -> StepSize:
        """That of the batch's rule."""
        return self.batch.rule.step_size


class SteepestDescent(Optimizer):
    """Steepest descent under a norm: ``w <- shrink(w) - length * direction(momentum(g))``, then the constraint.

    Each param group answers four questions for its parameters: which gradient we trust (``momentum``), which direction
    is steepest (``norm``), how far we go (``step_size``) and where the weights may live (``constraint``). Each
    ingredient is an object, or its name, or its repr. With the defaults the update is ``w <- w - lr * dualize(g)``
    (Bernstein & Newhouse, arXiv 2409.20325).

    Args:
        params: parameters, named parameters or param groups as in torch.optim, or a whole model. Of a model, every
            parameter gets the ingredients that ``geometry`` gives to its role; of a param group, those that it names
            (``{"params": ..., "norm": "max", "lr": 1e-3}``).
        lr: learning rate, a number or a tensor with one entry.
        norm: a norm or another direction, such as ``"spectral"``, ``Column(scale="unit")``, ``Smoothed(Max())``.
        momentum: ``None``, a number (the beta of an :class:`~normopt.momentum.EMA`, kept in ``group["momentum"]`` where
            schedulers can cycle it), or a momentum such as ``"nesterov"``.
        step_size: such as ``"constant"``, or ``"dual"``: lr times the dual norm summed over all layers.
        constraint: ``None``, a constraint such as ``WeightDecay(0.1)``, or several.
        options: numbers that ingredients read by name from the param group, see :class:`~normopt.ingredient.Option`;
            every group can have its own.
        geometry: with a model, a table role -> norm or dict of param-group options, or the name of one. It is laid over
            the optimizer's own table.
        overrides: with a model, glob pattern over parameter names -> role, norm or dict, see :func:`normopt.roles`.
        view: how tensors are seen as matrices; a model's roles have views of their own.
        maximize: go up instead of down.
        foreach: taken for torch's sake; tensors are always batched.
        fused: likewise.
        capturable: must be False.
        differentiable: must be False.

    Raises:
        ValueError: an unknown name, a number out of range, a norm that does not fit a parameter's shape; and in
            ``step``, before anything has changed, a sparse or complex gradient. Messages name parameter or argument.
        TypeError: a param group with an entry that none of its ingredients reads.
    """

    #: What each role of a whole model gets; ``{}`` is the optimizer's own rule.
    geometry: ClassVar[Geometry] = {"*": {}}
    #: Every subclass by its lower-case name, for :func:`normopt.create`; of two with one name the first.
    registry: ClassVar[dict[str, type[SteepestDescent]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if vars(cls).get("_abstract", False):
            return
        known = SteepestDescent.registry.setdefault(cls.__name__.lower(), cls)
        if (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__):
            SteepestDescent.registry[cls.__name__.lower()] = cls  # defined anew, as in a notebook

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        norm: str | Stage = "spectral",
        momentum: float | str | Momentum | None = None,
        step_size: str | StepSize = "constant",
        constraint: str | Constraint | Iterable[Constraint] | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        geometry: str | Geometry | None = None,
        overrides: Mapping[str, Any] | None = None,
        view: View | Mapping[str, Any] | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        if capturable or differentiable:
            raise ValueError("capturable and differentiable steps are not supported; leave both False")
        given = {"norm": norm, "momentum": momentum, "step_size": step_size, "constraint": constraint}
        rule = Rule().updated({**given, "view": view or View()})
        numbers = {**({"momentum": momentum} if isinstance(momentum, (int, float)) else {}), **(options or {})}
        for name in numbers.keys() - rule.options():
            raise TypeError(f"options: no ingredient of {rule} reads {name!r}; {nearest(name, rule.options())}")
        if isinstance(params, nn.Module):
            params = param_groups(params, overlaid(self.geometry, geometry), overrides)
        elif geometry is not None or overrides is not None:
            raise ValueError("geometry and overrides need a whole model: pass the module instead of its parameters")
        self._batches_of: dict[int, list[Batch]] = {}
        super().__init__(params, {"lr": lr, "maximize": maximize, "rule": repr(rule), **numbers})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._batches_of = {}

    # Param groups ---------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group as in torch.optim; it may name its own ingredients, and ``lr_ratio`` in place of ``lr``."""
        group = dict(param_group)
        rule = self._rule_of(group)
        group["rule"] = repr(rule)
        if "lr_ratio" in group:
            group["lr"] = self.defaults["lr"] * group.pop("lr_ratio")
        own = {name for role in self.geometry for name in entry(self.geometry, role)} if "role" in group else set()
        _check_options({**self.defaults, **group}, rule, self.defaults.keys() | own)
        super().add_param_group(group)
        group = self.param_groups[-1]
        try:
            _check_parameters(group, rule)
        except ValueError:
            del self.param_groups[-1]
            raise
        for name, value in rule.step_size.init_shared().items():
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            fresh = torch.tensor(value, dtype=double(device), device=device)
            group[name] = next((other[name] for other in self.param_groups if name in other), fresh)

    def _rule_of(self, group: dict[str, Any]) -> Rule:
        """The optimizer's own rule with the ingredients and bounds that the group names, which are taken out of it."""
        bounds = group.pop("bounds", None)
        return self._unbounded_rule_of(group).bounded(bounds)

    def _unbounded_rule_of(self, group: dict[str, Any]) -> Rule:
        default = _rule(self.defaults)
        if "rule" in group:
            return _rule(group)
        given = {name: group.pop(name) for name in INGREDIENTS & group.keys()}
        if isinstance(given.get("momentum"), (int, float)):
            beta = given.pop("momentum")
            if "momentum" in default.options() or default.momentum == NoMomentum():
                group["momentum"] = beta
            if "momentum" not in default.options():
                given["momentum"] = beta if default.momentum == NoMomentum() else with_beta(default.momentum, beta)
        return default.updated(given)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, of an optimizer with the same ingredients.

        State keeps the dtype that it was saved with (torch would cast it to the parameter's).

        Raises:
            ValueError: other param groups or other ingredients; nothing has been loaded.
        """
        for i, (mine, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            if "rule" not in saved or _rule(mine) != _rule(saved):
                raise ValueError(f"param group {i} does not match the saved one: {_difference(mine, saved)}")
        super().load_state_dict(state_dict)
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(mine["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                        self.state[p][name] = value.to(self.state[p][name].device, copy=True)

    # One step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. ``closure``, if given, computes the loss and the gradients; its value is returned.

        Momenta that look back need a closure. From the second step on it is called twice: at the weights as they are,
        and at those of such momenta before the last step, after which weights and gradients are put back. Both calls
        must see the same sample: fresh batches, dropout and running statistics are the caller's duty, and gradients of
        parameters that are not in this optimizer are computed twice.

        Raises:
            ValueError: no closure for a momentum that looks back, or a gradient that cannot be used; nothing has moved.
        """
        if closure is None:
            _check_alone(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            _check_gradients(group)
        batches = [batch for group in self.param_groups for batch in self._batches(group)]
        # One batch after the other, so that temporary memory stays small, unless a step size must see all of them.
        past = self._look_back(batches, closure)
        begun = (_begin(batch, past.get(batch)) for batch in batches if not batch.look())
        moves = map(_direct, self._surveyed(list(begun)) if _any(batches, "survey") else begun)
        for move in self._measured(list(moves)) if _any(batches, "measure") else moves:
            _apply(move)
        return loss

    def _batches(self, group: dict[str, Any]) -> list[Batch]:
        """The group's parameters that have gradients, in batches; those of the last step where nothing has changed."""
        params = [p for p in group["params"] if p.grad is not None]
        rule = _rule(group).resolve(group)
        batches = self._batches_of.get(id(group), [])
        if not _same(batches, group, params, self.state) or not all(batch.holds_state_of(rule) for batch in batches):
            batches = list(partition(group, params, rule, self.state))
            self._batches_of[id(group)] = batches
        for batch in batches:
            batch.prepare(rule, _shared(batch))
        return batches

    def _look_back(self, batches: list[Batch], closure: Callable[[], Any] | None) -> dict[Batch, list[Tensor]]:
        """The gradients at the weights before the last step, for those batches whose momentum asks for them.

        Weights and gradients are put back, also when the closure raises.
        """
        asking = [batch for batch in batches if batch.rule.momentum.looks_back and batch.taken() > 0]
        if not asking or closure is None:
            return {}
        every = [p for group in self.param_groups for p in group["params"]]
        moved = [p for batch in asking for p in batch.params]
        gradients, weights = [p.grad for p in every], [p.detach().clone() for p in moved]
        try:
            for p in every:
                p.grad = None  # so that the closure cannot add to what is kept
            for batch in asking:
                torch._foreach_copy_(batch.params, batch.scatter(batch.state["previous"]))
            with torch.enable_grad():
                closure()
            return {
                batch: [torch.zeros_like(p) if p.grad is None else p.grad for p in batch.params] for batch in asking
            }
        finally:
            torch._foreach_copy_(moved, weights)
            for p, gradient in zip(every, gradients, strict=True):
                p.grad = gradient

    def _surveyed(self, moves: list[_Move]) -> list[_Move]:
        """The same moves; step sizes that need all gradients have seen them."""
        for kind in _kinds(moves, "survey"):
            self._conclude(kind, [m.step_size.survey(m.batch.state, m.context, m.context.shared) for m in kind])
        return moves

    def _measured(self, moves: list[_Move]) -> list[_Move]:
        """The same moves; step sizes that need all directions have seen them."""
        for kind in _kinds(moves, "measure"):
            self._conclude(kind, [m.step_size.measure(m.averaged, m.direction, m.context) for m in kind])
        return moves

    def _conclude(self, moves: list[_Move], summands: list[dict[str, Tensor]]) -> None:
        """Give all moves what their step size concludes, and keep its state in all groups with such a step size.

        Step sizes of one kind share sums and state, in all groups; the first group's numbers count.
        """
        step_size, before = moves[0].step_size, moves[0].context.shared
        home = moves[0].batch.params[0].device
        sums = {name: torch.stack([each[name].to(home) for each in summands]).sum() for name in summands[0]}
        shared = step_size.conclude(sums, before)
        for move in moves:
            move.context.shared = shared
        for group in self.param_groups:
            if type(_rule(group).step_size) is type(step_size):
                group.update({name: shared[name] for name in step_size.init_shared()})


def _begin(batch: Batch, past: list[Tensor] | None) -> _Move:
    """From the gradient, and that of the past for momenta that look back, to what the step size sees."""
    step = batch.advance()

    def seen(raw: Tensor, weights: Callable[[], Tensor]) -> Context:
        context = Context(raw, raw, step, batch.rate, batch.rule.norm, weights)
        for constraint in batch.rule.constraint:
            if constraint.overrides("gradient"):
                context.g = constraint.gradient(context.g, context)
        return context

    context = seen(batch.gradient(), batch.weights)
    context.shared, context.shrink, context.is_vector = _shared(batch), batch.shrink, batch.is_vector
    if past is not None:
        context.past = lambda: seen(batch.gradient(past), lambda: batch.state["previous"]).g
    return _Move(batch, context)


def _direct(move: _Move) -> _Move:
    """From the gradient to the direction."""
    rule, state, context = move.batch.rule, move.batch.state, move.context
    leading, context.g = rule.step_size.weigh(context.g, context, context.shared)
    move.averaged = rule.momentum(leading, state, context)
    move.direction = rule.norm(move.averaged, state, context)
    return move


def _any(batches: list[Batch], method: str) -> bool:
    """Whether some batch's step size overrides ``method``."""
    return any(batch.rule.step_size.overrides(method) for batch in batches)


def _kinds(moves: list[_Move], method: str) -> list[list[_Move]]:
    """The moves whose step size overrides ``method``, those of one kind together."""
    kinds: dict[type[StepSize], list[_Move]] = defaultdict(list)
    for move in moves:
        if move.step_size.overrides(method):
            kinds[type(move.step_size)].append(move)
    return list(kinds.values())


def _apply(move: _Move) -> None:
    """From the direction to the new weights."""
    batch, context, d = move.batch, move.context, move.direction
    rule, params = batch.rule, batch.params
    for constraint in rule.constraint:
        if constraint.overrides("update"):
            d = constraint.update(d, context)
    size, shrink = -rule.step_size.length(move.averaged, d, context, context.shared), context.shrink
    bounds = [constraint for constraint in rule.constraint if constraint.overrides("weight")]
    if batch.dtype != params[0].dtype or (isinstance(shrink, Tensor) and shrink.ndim):
        _keep(batch, bounds, context, batch.weights() * shrink + d * size)
        return
    if isinstance(shrink, Tensor):  # 1 - 1e-8 is 1 in float32, but w - 1e-8 w need not be w
        torch._foreach_add_(params, torch._foreach_mul(params, shrink - 1))
    elif shrink != 1.0:
        torch._foreach_mul_(params, shrink)
    if isinstance(size, Tensor):
        torch._foreach_add_(params, batch.scatter(d * size))
    else:
        torch._foreach_add_(params, batch.scatter(d), alpha=size)
    if bounds:
        _keep(batch, bounds, context, batch.weights())


def _keep(batch: Batch, bounds: list[Constraint], context: Context, new: Tensor) -> None:
    """Write the new weights to the parameters, brought to where they may live."""
    for constraint in bounds:
        new = constraint.weight(new, batch.state, context)
    torch._foreach_copy_(batch.params, batch.scatter(new))


def _rule(group: Mapping[str, Any]) -> Rule:
    rule = parse(group["rule"])
    assert isinstance(rule, Rule)
    return rule


def _shared(batch: Batch) -> Shared:
    return {name: batch.group[name] for name in batch.rule.step_size.init_shared()}


def _same(batches: list[Batch], group: dict[str, Any], params: list[Tensor], state: Any) -> bool:
    """Whether ``batches`` are made of exactly ``params`` of ``group``, with their state untouched since."""
    held = [p for batch in batches for p in batch.params]
    return (
        len(held) == len(params)
        and {*map(id, held)} == {*map(id, params)}
        and all(batch.group is group and batch.is_current(state) for batch in batches)
    )


def _check_options(options: Mapping[str, Any], rule: Rule, spare: Set[str]) -> None:
    """Every number in range, every option that the rule reads present, and none that nothing reads save ``spare``."""
    lr = options["lr"]
    is_number = lr.numel() == 1 if isinstance(lr, Tensor) else isinstance(lr, Real) and not isinstance(lr, bool)
    if not is_number or not float(lr) >= 0:
        raise ValueError(f"lr must be a number that is not negative, got {lr!r}")
    known = rule.options() | INGREDIENTS | {"lr", "maximize"}
    for name in options.keys() - known - _GROUP_KEYS - spare:
        raise TypeError(f"param group: no ingredient of {rule} reads {name!r}; {nearest(name, known)}")
    resolved = rule.resolve(options)
    resolved.step_size.check_composes(resolved.norm)


def _check_parameters(group: dict[str, Any], rule: Rule) -> None:
    for i, p in enumerate(group["params"]):
        if type(p).__name__ == "DTensor":
            raise ValueError(f"{_name(group, i)} is sharded (a DTensor), which is not supported; pass whole tensors")
        if not p.is_floating_point():
            raise ValueError(f"{_name(group, i)} has dtype {p.dtype}; only real floating-point ones can be trained")
        rule.check_fits(_name(group, i), tuple(p.shape))


def _check_alone(groups: list[dict[str, Any]]) -> None:
    for rule in map(_rule, groups):
        if rule.momentum.looks_back:
            raise ValueError(
                f"{rule.momentum} compares the gradients of one sample at two points: give step a closure that "
                "computes the loss and the gradients, optimizer.step(closure)"
            )


def _check_gradients(group: dict[str, Any]) -> None:
    for i, p in enumerate(group["params"]):
        if p.grad is not None and (p.grad.layout != torch.strided or p.grad.is_complex()):
            kind = "complex" if p.grad.is_complex() else "sparse"
            raise ValueError(f"{_name(group, i)} has a {kind} gradient; only dense real gradients can be used")


def _name(group: Mapping[str, Any], i: int) -> str:
    names = group.get("param_names")
    return f"parameter {names[i]!r}" if names else f"parameter {i} of its group"


def _difference(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """Which ingredients two param groups do not share, for an error message."""
    if "rule" not in saved:
        return f"it was saved by another library and has no ingredients; this one has {_rule(mine)}"
    a, b = _rule(mine), _rule(saved)
    names = [name for name in sorted(INGREDIENTS) if getattr(a, name) != getattr(b, name)]
    return "; ".join(f"{name} is {getattr(a, name)!r} here, {getattr(b, name)!r} in the saved state" for name in names)
