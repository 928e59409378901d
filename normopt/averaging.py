"""Evaluating elsewhere: gradients between an optimizer's weights and their average, evaluation at the average."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from normopt.constraints.base import Constraint
from normopt.ingredient import Context, check_count, check_range
from normopt.ingredient.view import is_small
from normopt.numerics.sharded import is_sharded, whole
from normopt.optimizer import SteepestDescent
from normopt.rule import Rule, rule_of

#: What a state dict has beside that of the optimizer: of every parameter, and of every param group.
OF_PARAMETER, OF_GROUP = ("base", "average"), "averaging"


class Averaged(Optimizer):
    """Any optimizer, with gradients taken and the model evaluated at mixtures of its weights and their average.

    The optimizer moves its base iterate ``z``; ``x`` is an average of ``z`` over all steps. In training the parameters
    are ``y = (1 - interpolation) z + interpolation x``, where gradients are taken; after :meth:`eval` they are
    ``(1 - share) z + share x``, and after :meth:`train` they are ``y`` again. One step is ``z <- step(z, g(y))``,
    ``x <- (1 - c) x + c z``, where without ``beta`` the weight of each step in the average is ``k^r lr_max^power``,
    ``k`` the number of the step from 1 and ``lr_max`` the largest learning rate of the param group so far.

    * ``Averaged(optimizer)`` is schedule-free learning (Defazio et al., arXiv 2405.15682), around AdamW without first
      momentum (``betas=(0, beta2)``) and around SGD as the package ``schedulefree`` has it.
    * ``Averaged(muon, power=0.0, rise=(T0, rho))`` is AMUSE (arXiv 2605.22432).
    * ``Averaged(normuon)`` is schedule-free NorMuon (arXiv 2605.23061).
    * ``Averaged(optimizer, mu_y, beta=mu_x)`` is generalized primal averaging (arXiv 2512.17131).
    * ``Averaged(optimizer, 0.0, beta=1 - 1/150, start=2400, share=0.6)`` is an average of the tail.
    * ``Averaged(optimizer, -beta (1 - gamma) / gamma, beta=gamma, share=0.0, leap=True)`` is EMA-Nesterov (arXiv
      2605.25395): the optimizer steps from ``z + beta m``, ``m`` the average of the movements of ``z``.

    ``param_groups`` are the optimizer's, for schedules and :func:`normopt.set_lr`. ``z`` is kept in the parameter's
    dtype, so that what the optimizer knows of its rounding stays true, and ``x`` in float32 or better. What ``z`` obeys
    ``x`` obeys too where the bound is convex; bounds of a :class:`SteepestDescent` that are not (spheres,
    :class:`~normopt.Stiefel`) are applied to the weights that :meth:`eval` shows. Weights that are changed by hand
    between steps are overwritten by the next one.

    Of sharded parameters each rank averages its part; all ranks must call ``step``, ``train``, ``eval`` and
    ``state_dict`` together. A forward pass without a backward pass leaves weights gathered under ``fully_shard``: call
    ``model.reshard()`` after an evaluation, before ``train``.

    Args:
        optimizer: the one that moves ``z``, new or not; its momentum must not look back.
        interpolation: the share of ``x`` in ``y``; 0 takes gradients at ``z``, negative values lie beyond it. It may be
            assigned at any time.
        beta: decay rate of an exponential average, in [0, 1), whose ``c`` is ``1 - beta``; ``None`` for the mean with
            the weights above.
        power, r: exponents of these weights, not negative.
        weight_decay: decay at ``y``, as that of the package ``schedulefree``: ``z <- z - lr weight_decay y`` before the
            step. The optimizer's own decay is at ``z``.
        start: the first step that counts; before it ``x = y = z``.
        rise: ``(T0, rho)``, with which the share of ``x`` rises: ``1 - ((T0 - 1) / (k - 1))^rho (1 - interpolation)``
            from step T0 on.
        share: the share of ``x`` in the weights that are evaluated, in [0, 1].
        leap: the optimizer steps from ``y`` instead of ``z``.

    Raises:
        ValueError, TypeError: a number out of range; ``optimizer`` is none, or compares gradients at two points
            (STORM+), of which this class would move one.
        RuntimeError: ``step`` after ``eval`` without ``train``; nothing has changed.
    """

    #: Whether what a step moves is in the state, so that weights that are changed afterwards are overwritten.
    keeps_iterates = True

    def __init__(
        self,
        optimizer: Optimizer,
        interpolation: float = 0.9,
        *,
        beta: float | None = None,
        power: float = 2.0,
        r: float = 0.0,
        weight_decay: float = 0.0,
        start: int = 1,
        rise: tuple[int, float] | None = None,
        share: float = 1.0,
        leap: bool = False,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Averaged: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, SteepestDescent):
            for group in optimizer.param_groups:
                if rule_of(group).momentum.looks_back:
                    raise ValueError(
                        f"Averaged: {rule_of(group).momentum} compares gradients at two weights of its own"
                    )
        check_range(self, "interpolation", interpolation, -float("inf"), 1, closed=True)
        check_range(self, "share", share, 0, 1, closed=True)
        for name, value in (("power", power), ("r", r), ("weight_decay", weight_decay)):
            check_range(self, name, value, 0, float("inf"))
        if beta is not None:
            check_range(self, "beta", beta, 0, 1)
        check_count(self, "start", start)
        if rise is not None:
            if not isinstance(rise, (tuple, list)) or len(rise) != 2:
                raise TypeError(f"Averaged: rise must be None or two numbers (T0, rho), got {rise!r}")
            check_count(self, "rise", rise[0])
            check_range(self, "rise", rise[1], 0, float("inf"))
        self.interpolation, self.beta, self.power, self.r = interpolation, beta, power, r
        self.weight_decay, self.start, self.rise, self.share, self.leap = weight_decay, start, rise, share, leap
        self.is_training = True
        super().__init__([p for group in optimizer.param_groups for p in group["params"]], {})
        self.optimizer, self.defaults = optimizer, optimizer.defaults
        self._share_groups()
        self._numbers = [_fresh() for _ in self.param_groups]

    def _share_groups(self) -> None:
        self.param_groups = self.optimizer.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the optimizer."""
        if not hasattr(self, "optimizer"):  # called by torch's constructor
            super().add_param_group(param_group)
            return
        self.optimizer.add_param_group(param_group)
        self._numbers += [_fresh() for _ in self.param_groups[len(self._numbers) :]]

    def __getstate__(self) -> dict[str, Any]:
        kept = {name for name in vars(self) if name[0] != "_" and name != "step"}  # of schedulers, which wrap step
        return {name: vars(self)[name] for name in sorted({*kept, "_numbers"})}

    # Where the parameters are -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def train(self) -> None:
        """Put the parameters where gradients are taken."""
        if not self.is_training:
            self._show_training()
            self.is_training = True

    @torch.no_grad()
    def eval(self) -> None:
        """Put the parameters where the model is to be evaluated, and exported."""
        if self.is_training:
            for p, state, _ in self._held():
                p.copy_(_mixed(state, self.share))
            if self.share and isinstance(self.optimizer, SteepestDescent):
                _to_bounds(self.optimizer, self.state)
            self.is_training = False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """``with averaged.evaluating(): ...``: the evaluated weights inside, what was there before outside."""
        was_training = self.is_training
        self.eval()
        try:
            yield
        finally:
            if was_training:
                self.train()

    def _show_training(self) -> None:
        for p, state, numbers in self._held():
            p.copy_(_mixed(state, self._share_of_average(numbers["steps"] + 1)))

    def _held(self) -> Iterator[tuple[Tensor, dict[str, Tensor], dict[str, Any]]]:
        """Every parameter that has taken part in a step, its iterates, and the numbers of its group."""
        for group, numbers in zip(self.param_groups, self._numbers, strict=True):
            for p in group["params"]:
                if p in self.state:
                    yield p, self.state[p], numbers

    def _share_of_average(self, step: int) -> float:
        """The share of ``x`` in ``y`` at this step, from 1."""
        if step <= self.start:
            return 0.0
        if self.rise is None or step < max(self.rise[0], 2):
            return self.interpolation
        first, exponent = self.rise
        return 1 - ((first - 1) / (step - 1)) ** exponent * (1 - self.interpolation)

    # Steps ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure``, if given, computes loss and gradients at ``y``, and its value is returned."""
        if not self.is_training:
            raise RuntimeError("Averaged: the parameters are those for evaluation; call train() before the next step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p not in self.state:
                    wide = torch.promote_types(p.dtype, torch.float32)
                    self.state[p] = {"base": p.detach().clone(), "average": p.detach().to(wide, copy=True)}
        shown = [(p, p.detach().clone()) for p, _, _ in self._held()]
        try:
            self._put_base()
            self.optimizer.step()
        except BaseException:
            self._put(shown)
            raise
        if not getattr(self.optimizer, "took_step", True):  # left out for gradients that are not finite
            self._put(shown)
            return loss
        self._average()
        self._show_training()
        return loss

    @staticmethod
    def _put(shown: Iterable[tuple[Tensor, Tensor]]) -> None:
        for p, y in shown:
            p.copy_(y)

    def _put_base(self) -> None:
        """Let the parameters be what the optimizer is to move."""
        for group in self.param_groups:
            decay = float(group["lr"]) * self.weight_decay if self.weight_decay else 0.0
            for p in (p for p in group["params"] if p in self.state):
                moved = p if self.leap else self.state[p]["base"]
                p.copy_(moved if not decay or p.grad is None else moved - decay * p)

    def _average(self) -> None:
        """Take the new ``z`` into the average."""
        for group, numbers in zip(self.param_groups, self._numbers, strict=True):
            numbers["steps"] += 1
            weight = self._weight(float(group["lr"]), numbers)
            for p in group["params"]:
                if p in self.state:
                    state = self.state[p]
                    state["base"].copy_(p)
                    state["average"].lerp_(p.detach().to(state["average"].dtype), weight)

    def _weight(self, lr: float, numbers: dict[str, Any]) -> float:
        """The weight ``c`` of this step in the average."""
        numbers["lr_max"] = max(lr, numbers["lr_max"])
        if numbers["steps"] < self.start:
            return 1.0
        if self.beta is not None:
            return 1 - self.beta
        new = numbers["steps"] ** self.r * numbers["lr_max"] ** self.power
        numbers["weights"] += new
        return new / numbers["weights"] if numbers["weights"] else 0.0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none)

    # Saving and loading -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's, with ``base`` and ``average`` of each parameter and ``averaging`` of each param group.

        Save the model in the same mode; with the state both modes come back to the bit.
        """
        found = self.optimizer.state_dict()
        state = {key: dict(held) for key, held in found["state"].items()}
        for group, saved in zip(self.param_groups, found["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if p in self.state:
                    state.setdefault(key, {}).update(self.state[p])
        groups = [
            {**saved, OF_GROUP: {**numbers, "training": self.is_training}}
            for saved, numbers in zip(found["param_groups"], self._numbers, strict=True)
        ]
        return {**found, "state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; the parameters become those of the mode that it was saved in.

        Raises:
            ValueError: it was saved by an optimizer that is not averaged, or as the optimizer's own; nothing has been
                loaded.
        """
        groups = state_dict["param_groups"]
        if not all(OF_GROUP in group for group in groups):
            raise ValueError("Averaged: the saved state has no averages; load it into the optimizer before wrapping it")
        of_state = {
            k: {n: x for n, x in held.items() if n not in OF_PARAMETER} for k, held in state_dict["state"].items()
        }
        of_groups = [{name: x for name, x in group.items() if name != OF_GROUP} for group in groups]
        self.optimizer.load_state_dict(
            {**state_dict, "state": {k: held for k, held in of_state.items() if held}, "param_groups": of_groups}
        )
        self._share_groups()
        self._numbers = [{name: group[OF_GROUP][name] for name in _fresh()} for group in groups]
        self.state.clear()
        for group, saved in zip(self.param_groups, groups, strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                held = state_dict["state"].get(key, {})
                if "base" in held:
                    self.state[p] = {name: _placed(held[name].detach(), p) for name in OF_PARAMETER}
        self.is_training = not groups[0][OF_GROUP]["training"]
        (self.eval if self.is_training else self.train)()


def _fresh() -> dict[str, Any]:
    """The numbers of a param group before its first step."""
    return {"steps": 0, "lr_max": 0.0, "weights": 0.0}


def _mixed(state: dict[str, Tensor], share: float) -> Tensor:
    """``(1 - share) z + share x``; ``z`` itself, to the bit, at 0."""
    base = state["base"]
    return base if not share else base.to(state["average"].dtype).lerp(state["average"], share)


def _placed(x: Tensor, p: Tensor) -> Tensor:
    """A copy of ``x``, which may be whole or a DTensor, placed as ``p`` is."""
    if type(x) is Tensor and not is_sharded(p):
        return x.to(p.device, copy=True)
    from normopt.engine import mesh  # which takes a while to import

    return mesh.placed_as(p, x.to(p.device, copy=True))


def _to_bounds(optimizer: SteepestDescent, held: Mapping[Tensor, Any]) -> None:
    """Bring the parameters in ``held`` to where the optimizer's bounds let them live.

    A sharded parameter is brought together for it, one after the other; all ranks must call together.
    """
    bounded: dict[Tensor, tuple[Rule, list[Constraint], str]] = {}
    for group in optimizer.param_groups:
        rule = rule_of(group).at(group)
        bounds = [each for each in rule.acting("weight") if each.place < 2 and not each.compares]
        moved = [p for p in group["params"] if p in held and optimizer.state[p]]
        bounded |= {p: (rule, bounds, group.get("role", "")) for p in moved if bounds}
    known = _state_of_bounds(optimizer, bounded)
    for p, (rule, bounds, role) in bounded.items():
        wide = whole(p).to(torch.promote_types(p.dtype, torch.float32))
        w, state = rule.view.apply(wide), known[p]
        context = Context(w, w, 1, 0.0, None, w.clone, is_vector=is_small(p.shape, role))
        for bound in bounds:
            w = bound.weight(w, state, context)
        p.copy_(_placed(rule.view.invert(w.contiguous(), p.shape), p))


def _state_of_bounds(
    optimizer: SteepestDescent, bounded: Mapping[Tensor, tuple[Rule, list[Constraint], str]]
) -> dict[Tensor, dict[str, Tensor]]:
    """A copy of the state that each parameter's bounds keep, whole on every rank."""
    found: dict[Tensor, dict[str, Any]] = {}
    for p, (rule, bounds, _) in bounded.items():
        like = rule.view.apply(torch.empty(p.shape, device="meta"))
        names = {"step", *(name for bound in bounds for name in bound.init_state(like, like.clone))}
        found[p] = {name: x for name, x in optimizer.state[p].items() if name in names}
    layout = optimizer.layout()
    if layout is not None:
        from normopt.engine import sharded_state

        found |= sharded_state.saved(layout, found)
    return {p: {name: whole(x).clone() for name, x in state.items()} for p, state in found.items()}
