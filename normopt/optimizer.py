"""SteepestDescent: the only optimizer loop. Everything else in the library is an ingredient of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Set
from types import FunctionType, MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.weak import WeakTensorKeyDictionary

from normopt.constraints.base import Constraint
from normopt.engine import loop, products
from normopt.engine.batch import Batch
from normopt.engine.checkpoint import ADDED, VERSION, accepted, restored, to_home
from normopt.engine.checks import (
    GROUP_KEYS,
    SAID,
    check_alone,
    check_distinct,
    check_fixed,
    check_gradients,
    check_inputs,
    check_known,
    check_lr,
    check_numbers,
    check_parameters,
    check_policy,
    check_unsaid,
    dtype_name,
)
from normopt.engine.finite import FiniteGuard, check_capture
from normopt.engine.look_back import look_back
from normopt.engine.names import follow_names, learn_names
from normopt.engine.plan import Plan
from normopt.engine.prepare import adopt, prepared
from normopt.engine.schedulers import first_weight, forward, own_rates, rates
from normopt.engine.totals import Everywhere, share
from normopt.engine.warm import WarmStep
from normopt.engine.wave import Wave
from normopt.ingredient import Stage, check_flag, nearest, plain
from normopt.ingredient.view import View
from normopt.metrics import Metrics
from normopt.momentum.base import Momentum, NoMomentum
from normopt.numerics.autocast import _without_autocast
from normopt.roles.geometries import overlaid
from normopt.roles.groups import (
    all_tensors,
    groups_by_shape,
    groups_of_module,
    param_groups,
    to_distinct_names,
    vectors_by_adam,
)
from normopt.roles.options import Geometry, entry, merged, with_beta
from normopt.rule import INGREDIENTS, Rule, rule_of
from normopt.stepsize.base import StepSize, double
from normopt.stepsize.free import LearningRateFree

if TYPE_CHECKING:
    from normopt.engine.layout import Layout

P = ParamSpec("P")
T = TypeVar("T")


class SteepestDescent(Optimizer):
    """Steepest descent under a norm: ``w <- shrink(w) - length * direction(momentum(g))``, then the constraint.

    Each param group answers four questions for its parameters: which gradient we trust (``momentum``), which direction
    is steepest (``norm``), how far we go (``step_size``) and where the weights may live (``constraint``). Each
    ingredient is an object, or its name, or its repr. With the defaults the update is ``w <- w - lr * dualize(g)``
    (Bernstein & Newhouse, arXiv 2409.20325).

    Args:
        params: parameters, named parameters or param groups as in torch.optim, or a whole model. Of a model, every
            parameter gets the ingredients that ``geometry`` gives to its role; vectors and scalars that ``norm`` cannot
            take, and for which no other is named, move by Adam. Param groups name their own ingredients
            (``{"params": ..., "norm": "max", "lr": 1e-3}``).
        lr: learning rate, a number or a tensor with one entry; by default 1e-3, and 1 for step sizes that find it.
        norm: a norm or another direction, such as ``"spectral"``, ``Column(scale="unit")``, ``Smoothed(Max())``.
        momentum: ``None``, a number (the beta of an :class:`~normopt.momentum.EMA`, kept in ``group["momentum"]`` where
            schedulers can cycle it), or a momentum such as ``"nesterov"``.
        step_size: such as ``"constant"``, or ``"dual"``: lr times the dual norm summed over all layers.
        constraint: ``None``, a constraint such as ``WeightDecay(0.1)``, or several.
        options: numbers that ingredients read by name from the param group, see :class:`~normopt.ingredient.Option`;
            every group can have its own.
        geometry: with a model, a table role -> norm or dict of param-group options, or the name of one. It is laid over
            the optimizer's own table.
        overrides: with a model, glob pattern over parameter names -> role, norm or dict;
            see :func:`normopt.infer_roles`.
        view: how tensors are seen as matrices; a model's roles have views of their own.
        maximize: go up instead of down.
        nonfinite: what ``step`` does when it finds NaN or Inf in a gradient. ``"raise"``: an error that names the
            parameters; ``"skip"``: nothing, as a ``GradScaler`` does; ``"propagate"``: it does not look. Until then
            nothing has changed, neither weights nor state. Every param group can have its own; one bad gradient keeps
            all groups where they are. On accelerators the device leaves the step out without being waited for, the
            error comes with the next call of ``step``, and step counters are right again by then.
        state_dtype: the dtype that averages (momentum, second moments) are kept in: ``"bfloat16"``, ``"float32"``, or
            ``"parameter"`` for each parameter's own; by default float32 or better. They are computed in float32 and
            rounded up or down at random, so that nothing is lost on average; the same run rounds alike. What must be
            exact stays in float32: bases, matrices of second moments, sums over the whole run. Every group can have
            its own.
        foreach: accepted for compatibility with torch.optim; has no effect: tensors are always batched.
        fused: accepted for compatibility with torch.optim; has no effect.
        capturable: keep step counters on the parameters' device and look at no number, so that ``step`` can be captured
            in a CUDA graph, after a first step outside of it; with ``lr`` as a tensor the schedule is captured too.
            Every param group can have its own, all must have it to be captured. Bad gradients are left out of replayed
            steps on the device, and no error comes.
        compile: run the updates through ``torch.compile``, as one graph: the same results to rounding. The first step
            takes as long as compilation does; neither a new learning rate nor the step's count compiles anything anew.
            Rules whose host looks at numbers (those that ``capturable`` refuses) are run as without.
        deterministic: choose the form and the dtype of matrix products by a rule in place of measuring which is
            fastest, so that two processes give the same bits; ``torch.use_deterministic_algorithms`` does so too. What
            has been chosen is kept in the param groups, as ``"products"``, and goes before either.
        differentiable: must be False.
        mesh: for plain parameters that are equal on all ranks of a device mesh, as under DistributedDataParallel: each
            tensor is moved by one of them, so that work and state of a rank fall by their number. Sharded parameters
            (DTensors) have meshes of their own.
        process_group: for plain parameters that every rank moves by itself: the ranks that must step together. If one
            of them finds NaN or Inf, or has no gradient where others have one, all raise the error, or all skip.

    Raises:
        ValueError: an unknown name, a number out of range, a norm that does not fit a parameter's shape, a parameter
            that a wrapper has flattened or that is given twice; and in ``step``, before anything has changed, a
            gradient that is sparse, complex, not finite or shaped otherwise. Messages name parameter or argument.
        TypeError: a param group with an entry that none of its ingredients reads.
    """

    #: What ``table`` and ``rest`` said when the optimizer was made.
    own_table: Geometry
    #: The same under the user's geometry: what modules get that are added later.
    role_table: Geometry
    #: What a declared optimizer was made with, save parameters: a group may name another value.
    arguments: Mapping[str, Any] = MappingProxyType({})
    #: Entries of torch's param groups that have only one value here.
    fixed: ClassVar[Mapping[str, Any]] = {"differentiable": False}
    #: Whether updates run through ``torch.compile``.
    compiles: bool = False
    #: Where plain parameters are replicated, and which processes step together.
    _mesh: DeviceMesh | None = None
    _process_group: Any = None
    #: Whether products are chosen by a rule, not measured.
    is_deterministic: bool = False
    #: Whether the last step was taken, and not left out by ``nonfinite="skip"``. On accelerators the host does not know
    #: of gradients that are not finite, and this stays True.
    took_step: bool = True
    #: Every subclass by its lower-case name, for :func:`normopt.create`; of two with one name the first.
    registry: ClassVar[dict[str, type[SteepestDescent]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls._is_abstract():
            return
        known = SteepestDescent.registry.setdefault(cls.__name__.lower(), cls)
        if (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__):
            SteepestDescent.registry[cls.__name__.lower()] = cls  # defined anew, as in a notebook

    @classmethod
    def _is_abstract(cls) -> bool:
        return bool(vars(cls).get("_abstract", False))

    def table(self) -> Geometry:
        """What a whole model's roles get, role -> norm or dict of param-group options; ``{}`` is the own rule.

        Roles that it does not name, neither by themselves nor by ``"*"``, get what ``rest`` says.
        """
        return {}

    def rest(self) -> dict[str, Any]:
        """The param-group options of roles that ``table`` does not name; by default the optimizer's own rule.

        Vectors and scalars that the own rule's direction cannot take, and for which no other is named, move by Adam.
        """
        return {}

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor | None = None,
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
        nonfinite: str = "raise",
        state_dtype: str | torch.dtype | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        compile: bool = False,
        deterministic: bool = False,
        differentiable: bool = False,
        mesh: DeviceMesh | None = None,
        process_group: Any = None,
    ) -> None:
        if differentiable:
            raise ValueError("differentiable steps are not supported; leave differentiable False")
        for name, flag in (("compile", compile), ("deterministic", deterministic)):
            check_flag(type(self).__name__, name, flag)
        momentum, options, lr = plain(momentum), {name: plain(x) for name, x in (options or {}).items()}, plain(lr)
        given = {"norm": norm, "momentum": momentum, "step_size": step_size, "constraint": constraint}
        rule = Rule().updated({**given, "view": view or View()})
        numbers = {**({"momentum": momentum} if isinstance(momentum, (int, float)) else {}), **options}
        for name in numbers.keys() - rule.options():
            raise TypeError(f"options: no ingredient of {rule} reads {name!r}; {nearest(name, rule.options())}")
        if lr is None:
            lr = 1.0 if isinstance(rule.step_size, LearningRateFree) else 1e-3
        self.own_table = {"*": self.rest(), **self.table()}
        self.role_table = overlaid(self.own_table, geometry)
        if isinstance(params, nn.Module):
            params = param_groups(params, self.role_table, overrides)
            params = (
                params if rule.norm.takes_vectors else list(vectors_by_adam(params, rule.step_size, rule.constraint))
            )
        elif geometry is not None or overrides is not None:
            raise ValueError("geometry and overrides need a whole model: pass the module instead of its parameters")
        self.compiles, self.is_deterministic = compile, deterministic
        self._mesh, self._process_group = mesh, process_group
        self._names: MutableMapping[Tensor, list[Any]] = WeakTensorKeyDictionary()
        #: Called after the closure, before anything is checked: statistics of the model that rules read.
        self._learners: list[Callable[[Layout | None], None]] = []
        self._forget_steps()
        fixed = {"lr": lr, "maximize": maximize, "nonfinite": nonfinite, "capturable": capturable, "rule": repr(rule)}
        super().__init__(params, {**fixed, "state_dtype": dtype_name(state_dtype), "products": "", **numbers})
        self._check_geometry()
        if not {"betas", "momentum"} & self.defaults.keys():
            weight = first_weight((group, rule_of(group)) for group in self.param_groups)
            self.defaults |= {} if weight is None else {"momentum": weight}  # for schedulers that cycle it

    def _forget_steps(self) -> None:
        self._plans: dict[int, list[Plan]] = {}
        self._warm: WarmStep | None = None
        self._layout: Layout | None = None
        self._guard = FiniteGuard()
        self._compiled = torch.compile(_own_copy(loop.take_step)) if self.compiles else loop.take_step

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch's, which groups that are added later would get
        self.defaults = {**ADDED, **self.defaults}
        self._names = WeakTensorKeyDictionary()
        vars(self).setdefault("_learners", [])  # of a copy, whose model is another
        self.role_table = state.get("role_table", overlaid(self.own_table, None))
        self._forget_steps()
        for group in self.param_groups:
            learn_names(self._names, group)
            for name, value in {**ADDED, "state_version": VERSION}.items():
                group.setdefault(name, value)
            if "lr_ratio" not in group:
                group |= rates({"lr": group.get("initial_lr", group["lr"])}, self.defaults["lr"])

    def __getstate__(self) -> dict[str, Any]:
        self._guard.settle(self.param_groups)
        names = ("own_table", "role_table", "compiles", "is_deterministic", "_mesh", "_process_group")
        kept = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **kept, "arguments": dict(self.arguments)}

    # Param groups ---------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group as in torch.optim; it may name its own ingredients, and ``lr_ratio`` beside ``lr``.

        ``params`` may be a module: it becomes one group for each role, as a whole model does, but none of its layers is
        taken for the output layer. Parameters without a module that come to those of a model, without a ``norm``, get
        roles by their shapes, with a warning. The ``lr`` of several roles is what ``lr`` is to a model: each role keeps
        its ratio to it.

        ``lr_ratio`` multiplies the group's ``lr``, or the optimizer's if the group has none. What stays in the group
        under this name is the ratio of its learning rate to the optimizer's, for :func:`normopt.set_lr`. An ``lr``
        that is a tensor is copied where another group holds it. Entries that nothing reads stay in the group.

        Raises:
            ValueError, TypeError: those of the constructor; no group has been added.
        """
        count = len(self.param_groups)
        try:
            for group in self._by_role(param_group):
                self._add(group)
        except Exception:
            del self.param_groups[count:]
            raise

    def _by_role(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The group itself, or one for each role of its parameters where it names a module or comes to a model."""
        params, names = group["params"], group.get("param_names")
        is_module = isinstance(params, nn.Module)
        if not isinstance(params, (nn.Module, Tensor, set)):
            params = list(params)
            check_distinct(params)
        comes_to_model = any("role" in other for other in self.param_groups)
        if not is_module and (not comes_to_model or {"norm", "rule", "role"} & group.keys() or not all_tensors(params)):
            return [{**group, "params": params}]
        if is_module:
            found = groups_of_module(params, self.role_table)
        else:
            found = groups_by_shape(zip(names, params, strict=True) if names else params, self.role_table)
        own = rule_of(self.defaults)
        if not own.norm.takes_vectors:
            found = list(vectors_by_adam(found, own.step_size, own.constraint))
        said = {name: value for name, value in group.items() if name not in ("params", "param_names", "lr_ratio")}
        ratio = group.get("lr_ratio", 1.0)
        check_lr(ratio, "lr_ratio")
        if "lr" in said and float(self.defaults["lr"]) > 0:
            check_lr(said["lr"])
            ratio = float(ratio) * float(said.pop("lr")) / float(self.defaults["lr"])
        known = [name for other in self.param_groups for name in other.get("param_names", ())]
        named = not self.param_groups or "param_names" in self.param_groups[0]
        for part in found:
            part["params"] = to_distinct_names(part["params"], known) if named else [p for _, p in part["params"]]
            if ratio != 1:
                part["lr_ratio"] = part.get("lr_ratio", 1.0) * ratio
        return [merged(part, said) for part in found]

    def _add(self, group: dict[str, Any]) -> None:
        rule = self._check_group(group)
        super().add_param_group(group)
        group = self.param_groups[-1]
        check_parameters(group, rule)
        own_rates(self.param_groups)
        learn_names(self._names, group)
        for name, value in rule.step_size.init_shared().items():
            device = group["params"][0].device if group["params"] else torch.device("cpu")
            fresh = torch.full((), value, dtype=double(device), device=device)
            kin = (other for other in self.param_groups[:-1] if type(rule_of(other).step_size) is type(rule.step_size))
            group[name] = next((other[name] for other in kin if name in other), fresh)

    def _check_group(self, group: dict[str, Any]) -> Rule:
        """The group's rule, which takes the place of the ingredients that it names; all numbers are in range."""
        was_complete = "rule" in group  # that of another optimizer
        check_fixed(group, self.fixed)
        rule = self._rule_of(group)
        group |= {name: plain(group[name]) for name in {*rule.options(), "lr", "lr_ratio"} & group.keys()}
        group |= {"rule": repr(rule), "state_version": VERSION}
        if "state_dtype" in group:
            group["state_dtype"] = dtype_name(group["state_dtype"])
        if not was_complete:
            own = {name for role in self.own_table for name in entry(self.own_table, role)} & group.keys()
            check_known(group.keys(), rule, self.defaults.keys() | self.arguments.keys() | own)
        for name in self._read_once() - rule.options() & group.keys():
            del group[name]
        if not (was_complete and "lr_ratio" in group):
            group |= rates(group, self.defaults["lr"])
        check_numbers({**self.defaults, **group}, rule)
        return rule

    def _read_once(self) -> Set[str]:
        """The names that a param group may say when it is added, and that are taken out of it then."""
        often = SAID | GROUP_KEYS | self.defaults.keys() | {"momentum"}  # which schedulers write
        return (INGREDIENTS | self.arguments.keys()) - often

    def _check_geometry(self) -> None:
        """Check what the optimizer's own table says of roles that no parameter plays, too."""
        for role in self.own_table:
            self._check_group({"role": role, **entry(self.own_table, role)})

    def _rule_of(self, group: dict[str, Any]) -> Rule:
        """The optimizer's own rule with the ingredients and bounds that the group names, which are taken out of it."""
        bounds = group.pop("bounds", None)
        return self._unbounded_rule_of(group).bounded(bounds)

    def _unbounded_rule_of(self, group: dict[str, Any]) -> Rule:
        if "rule" in group:
            return rule_of(group)
        default = self._own_rule(group)
        given = {name: group.pop(name) for name in INGREDIENTS & group.keys()}
        given = {name: plain(value) for name, value in given.items()}
        if isinstance(given.get("momentum"), (int, float)):
            beta = given.pop("momentum")
            if "momentum" in default.options() or default.momentum == NoMomentum():
                group["momentum"] = beta
            if "momentum" not in default.options():
                given["momentum"] = beta if default.momentum == NoMomentum() else with_beta(default.momentum, beta)
        return default.updated(given)

    def _own_rule(self, group: Mapping[str, Any]) -> Rule:
        """The optimizer's own rule, with what the group says of arguments that a rule is made of."""
        return rule_of(self.defaults)

    # Saving and loading -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Param groups and state as in torch.optim: tensors, numbers, strings, lists and dicts.

        With sharded parameters all ranks must call together, as torch.distributed.checkpoint does: state is then of
        DTensors, also where one rank has had all of it. With a ``mesh`` it is whole on every rank.
        """
        self._guard.settle(self.param_groups)
        for group in self.param_groups:
            follow_names(self._names, group)
        layout = self.layout()
        if layout is None:
            return super().state_dict()
        from normopt.engine import sharded_state

        found = sharded_state.saved(layout, self.state)
        numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}

        def put(_: Optimizer, held: dict[str, Any]) -> dict[str, Any]:
            state = {**held["state"], **{numbers[p]: state for p, state in found.items()}}
            return {**held, "state": {i: state[i] for i in sorted(state)}}  # in one order on all ranks

        hook = self.register_state_dict_post_hook(put, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned, of an optimizer with the same ingredients and parameters.

        State keeps the dtype that it was saved with (torch would cast it to the parameter's) and shares no memory with
        ``state_dict``. Hooks that change the state dict see it first. With sharded parameters all ranks must call
        together; state may be of DTensors, however placed, or whole, as one process has saved it.

        Raises:
            ValueError: other param groups, ingredients or shapes, or a number out of range; nothing has been loaded.
        """
        given: dict[str, Any] = {}

        def accept(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            given.update(accepted(self.param_groups, state_dict))
            for mine, saved in zip(self.param_groups, given["param_groups"], strict=True):
                saved.setdefault("lr_ratio", mine["lr_ratio"])  # of older versions, as is what they left in the group
                for name in (self._read_once() - rule_of(mine).options()) & saved.keys():
                    del saved[name]
            return given

        hook = self.register_load_state_dict_pre_hook(accept)  # the last one
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        self._guard = FiniteGuard()
        own_rates(self.param_groups)
        for mine, saved in zip(self.param_groups, given["param_groups"], strict=True):
            to_home(mine)
            for p, key in zip(mine["params"], saved["params"], strict=True):
                for name, value in given["state"].get(key, {}).items():
                    self.state[p][name] = restored(value, self.state[p][name])
        layout = self.layout()
        if layout is not None:
            from normopt.engine import sharded_state

            sharded_state.load(layout, self.state)

    # One step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. ``closure``, if given, computes the loss and the gradients; its value is returned.

        Momenta that look back need a closure. From the second step on it is called twice: at the weights as they are,
        and at those of such momenta before the last step, after which weights and gradients are put back. Both calls
        must see the same sample: fresh batches, dropout and running statistics are the caller's duty, and gradients of
        parameters that are not in this optimizer are computed twice.

        What ``state`` holds now is what the step uses, however it got there.

        Raises:
            ValueError: no closure for a momentum that looks back, or a gradient that cannot be used; nothing has moved.
        """
        check_capture(self.param_groups)
        self._guard.settle(self.param_groups)
        self._guard.raise_late()
        self.took_step = True
        if closure is None and not self._learners and self._step_warm():
            return None
        if closure is None:
            check_alone(self.param_groups, is_first=not self.state)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layout = self.layout()
        for learn in self._learners:
            learn(layout)
        if layout is None:
            self._check(None)
            self.took_step = self._take(Wave(self.param_groups, self.state, self._plans), closure)
            return loss
        layout.agree_on_products(self.is_deterministic)
        refusal: ValueError | None = None
        try:
            self._check(layout)
        except ValueError as error:  # of this rank; all raise it together
            refusal = error
        self.took_step = layout.may_go(self._guard, refusal)
        if self.took_step:
            for wave in layout.waves(self._guard, self.state):
                if not self._take(wave, closure):
                    self.took_step = False
                    break
        return loss

    def _step_warm(self) -> bool:
        """Take a step that is like the last one; if it is not, or gradients are not finite, nothing has changed."""
        warm, self._warm = self._warm, None  # which an error forgets
        if warm is None or (dist.is_available() and dist.is_initialized()):
            return False
        batches = warm.batches(self.param_groups, self.state, self._plans)
        if batches is None or not self._guard.are_finite(batches):
            return False
        with _without_autocast(), products.kept(self.param_groups, self.is_deterministic):
            self._move(batches, None)
        self._warm = warm
        return True

    def layout(self) -> Layout | None:
        """Where parameters are moved, if several processes step together; ``None`` if all of everything is here."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        from normopt.engine import layout  # which takes a while to import

        for group in self.param_groups:
            forward(group, rule_of(group), self.defaults)
        if self._layout is None or not self._layout.fits(self.param_groups):
            self._layout = layout.found(self.param_groups, self._mesh, self._process_group)
        return self._layout

    def _check(self, layout: Layout | None) -> None:
        """Raise for what is wrong with param groups and gradients, before anything has changed."""
        read_once = self._read_once()
        for group in self.param_groups:
            follow_names(self._names, group)
            check_unsaid(group, read_once)
            check_policy(group["nonfinite"])
            check_flag("param group", "maximize", group["maximize"])
            check_gradients(group)
            check_inputs(group, self.state)
        if layout is not None:
            layout.check(self.state)

    def _take(self, wave: Wave, closure: Callable[[], Any] | None) -> bool:
        """Move the parameters of a wave, or, if gradients are not finite, nothing; returns which."""
        self._warm = None  # which is of the plans before
        with _without_autocast():
            found = prepared(wave.groups, wave.plans, wave.state, self.defaults, self.compiles)
        batches = [batch for each in found for batch in each]
        if not wave.may_go(self._guard, batches):
            return False
        adopt(found, wave.plans, wave.state)
        looks = look_back(batches, self.param_groups, closure, wave.run)
        if looks and not wave.may_go(self._guard, batches, again=True):
            return False
        with _without_autocast(), products.kept(self.param_groups, self.is_deterministic):
            self._move(batches, wave.everywhere)
        if wave.groups is self.param_groups and closure is None and not self.compiles:
            self._warm = WarmStep.after(wave.groups, found)
        return True

    def _move(self, batches: list[Batch], everywhere: Everywhere | None) -> None:
        """Run the step. On accelerators it is masked out on the device if a gradient was not finite."""
        found_inf, guard = self._guard.found_inf(), self._guard
        going: list[Batch] = []
        for batch in batches:
            batch.found_inf = found_inf
            batch.clamps &= not guard.is_small
            guard.note_count(batch)
            if batch.look():
                continue
            batch.count()
            if batch.kernel is not None and found_inf is None and not guard.is_large:
                loop.run_kernel(batch, batch.kernel)
            else:
                going.append(batch)
        if not going and everywhere is None:
            return
        # Where all have kernels nothing is left to compile, and the compiler would skip the function ever after.
        traced = self.compiles and going and not any(batch.rule.decides_on_host for batch in going)
        if traced:
            products.settle(going)
        concluded = (self._compiled if traced else loop.take_step)(going, everywhere)
        share(self.param_groups, concluded, found_inf)

    def metrics(self) -> Metrics:
        """Measure the step in ``with optimizer.metrics() as measured: ...``, see :class:`~normopt.metrics.Metrics`."""
        return Metrics(self)


#: Numbers for the names of functions that are compiled.
_compiled_so_far = itertools.count(1)


def _own_copy(function: Callable[P, T]) -> Callable[P, T]:
    """The function with a code object and a name of its own.

    torch.compile keeps what it has compiled by code object, counts that against its limit of recompilations, and
    remembers sizes that have changed by name. Optimizers must not share either.
    """
    name = f"{function.__name__}_{next(_compiled_so_far)}"
    code = function.__code__.replace(co_name=name)
    return cast("Callable[P, T]", FunctionType(code, function.__globals__, name))
