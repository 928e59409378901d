"""Stages, which map a tensor to a tensor: the common base of momenta and directions, and the context that they see."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from normopt.ingredient.base import Ingredient

#: A learning rate or a factor: a number, or a tensor that broadcasts to what it multiplies.
Rate = float | Tensor


@dataclass(frozen=True)
class Context:
    """One batch at one step, as all its ingredients see it; read-only.

    Args:
        g: the gradient that second moments are taken of: after L2 and the step size's ``weigh``; inside a ``Chain``,
            the result of the previous stage.
        raw: the gradient before L2 and ``weigh``.
        step: the number of this step, counted from 1; a 0-dimensional tensor of the device in ``capturable`` steps.
        rate: the learning rate, after the step size's ``rate``.
        direction: the rule's direction, its options replaced by numbers.
        weights: returns the weights; see ``w``.
        scale: the step size's factor of gradients, by which an ``eps`` is multiplied too.
        shared: numbers of the whole optimizer, from the step size's ``conclude``: floats where reading a tensor's value
            is free, else 0-dimensional tensors.
        shrink: the factor of the weights before the update is added, a number or a tensor that broadcasts to them.
        is_vector: whether the parameters are vectors or scalars, seen as matrices with one row.
        past: returns the gradient at the previous weights; ``None`` if there is none. See ``previous``.
        dtype: the dtype of the parameters; ``None`` if it is the dtype of ``w``.
        places: returns an integer for each entry, by its parameter and its place in it, for hashes; ``None`` if the
            tensors are all there is.
        turns: returns a number for each matrix of the batch, the same wherever it is computed: at which of the steps of
            a period it has its turn; ``None`` if all matrices have theirs at once.
    """

    g: Tensor
    raw: Tensor
    step: Any
    rate: Rate
    direction: Any
    weights: Callable[[], Tensor]
    scale: Rate = 1.0
    shared: Mapping[str, Any] = field(default_factory=dict)
    shrink: Rate = 1.0
    is_vector: bool = False
    past: Callable[[], Tensor] | None = None
    dtype: torch.dtype | None = None
    places: Callable[[], Tensor] | None = None
    turns: Callable[[], list[int]] | None = None
    _held: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def previous(self) -> Tensor:
        """The gradient of this step's sample at the weights before the last step, for momenta that look back.

        Raises:
            ValueError: there is none; only the momentum of a rule can look back.
        """
        if self.past is None:
            raise ValueError("there is no gradient at the previous weights: only a rule's momentum can look back")
        return self._once("previous", self.past)

    @property
    def w(self) -> Tensor:
        """The weights before the step, shape ``(..., out, in)``, gathered at the first access; never modified."""
        return self._once("w", self.weights)

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._held:  # torch.compile does not trace functools.cached_property
            self._held[name] = make()
        return self._held[name]

    def unscaled(self, x: Tensor) -> Tensor:
        """``x / scale``: a gradient, or an average of gradients, without the step size's factor."""
        return x if isinstance(self.scale, float) and self.scale == 1.0 else x / self.scale

    def seeing(self, x: Tensor) -> Context:
        """This context for the next stage of a chain, whose gradient is ``x``."""
        return dataclasses.replace(self, g=x, weights=lambda: self.w, scale=1.0)

    def through(self, view: Callable[[Tensor], Tensor]) -> Context:
        """This context in other coordinates: ``view`` is applied to gradient and weights."""
        g = view(self.g)
        return dataclasses.replace(self, g=g, raw=g, weights=lambda: view(self.w))


class Stage(Ingredient):
    """A map from tensors to tensors, with state: the common base of momenta and directions.

    ``reduces`` says what one entry of the result depends on: ``"entry"``, ``"row"``, ``"column"``, ``"all"`` (sums over
    the whole matrix) or ``"matrix"`` (anything, the default). Entry-wise stages are run on many tensors laid end to
    end, all others on stacks of matrices of one shape.
    """

    reduces: ClassVar[str] = "matrix"
    #: Whether it asks for the weights. On sharded models they are then brought to where it runs; with False, asking for
    #: them is an error.
    sees_weights: ClassVar[bool] = True
    #: Whether it works on matrices: for a tensor with more dimensions a view must then say which matrices it holds.
    needs_matrix: ClassVar[bool] = False
    #: Degree of homogeneity: 1 if twice the input gives twice the result, 0 if the result is the same, ``None`` if
    #: neither.
    degree: ClassVar[int | None] = 1
    #: Whether its state holds squares of gradients, which overflow where gradients do not.
    squares: ClassVar[bool] = False
    #: Whether the first gradient only initializes the state, as SOAP's does: ``look`` is called, the weights stay, and
    #: the step is not counted.
    looks_first: ClassVar[bool] = False
    #: Whether it compares gradients of one sample at two points: ``context.previous`` is the gradient at the weights
    #: that its state holds as ``"previous"``. Only the momentum of a rule can; ``step`` then needs a closure.
    looks_back: ClassVar[bool] = False

    #: Whether it reads statistics of the inputs of a linear layer, which its state holds as ``"inputs"``, and which
    #: somebody has to put there before a step, see :class:`~normopt.InputStatistics`.
    reads_inputs: ClassVar[bool] = False

    @property
    def averages(self) -> frozenset[str]:
        """The state, by name without a trailing number, that ``state_dtype`` may keep in a dtype of lower precision.

        Only averages whose rounding errors fade: no sum over a whole run, nothing that is subtracted from another
        tensor or compared with it, no matrix that a root is taken of, no basis.
        """
        return frozenset()

    @property
    def takes_vectors(self) -> bool:
        """Whether the stage also works on vectors and scalars, seen as one row."""
        return not self.needs_matrix

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        """The state before the first step, for a batch ``x`` of shape ``(..., out, in)``; leading dimensions stay."""
        return {}

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        """Initialize the state, in place, from the first gradient; only called if ``looks_first``."""

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """Map ``x`` to the next stage's input.

        Args:
            x: the gradient or the result of the previous stage, shape ``(..., out, in)``; never modified.
            state: this stage's tensors, updated in place.
            context: gradient, weights, step number and so on; nothing in it may be modified.
        """
        raise NotImplementedError

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """Map ``x`` without updating the state. A stage with state must override this."""
        return self(x, state, context)


def coarsest(levels: Iterable[str]) -> str:
    """The ``reduces`` of a composition: the level of all stages that are not entry-wise, or ``"matrix"`` if several."""
    distinct = {level for level in levels if level != "entry"}
    return distinct.pop() if len(distinct) == 1 else "matrix" if distinct else "entry"


def is_of_inputs(name: str) -> bool:
    """Whether a piece of state is statistics of a layer's inputs, in whatever composition of stages."""
    return name.rpartition(".")[2] == "inputs"


def substate(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of ``state`` whose names begin with ``prefix``, under the names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


#: The columns of the periodic table, ``normopt.periodic_table()``.
NO_MEMORY, SECOND_MOMENT, ROTATED = "no memory", "second moment", "second moment, rotated"


class Direction(Stage):
    """Which direction is steepest: a :class:`Norm`, or a combination of norms (``normopt.directions``)."""

    #: Whether the length of the result is the direction's own; where not, a chain looks at the stage before.
    sets_length: ClassVar[bool] = True
    #: Whether the direction commutes with orthonormal changes of basis of rows and of columns.
    rotation_invariant: ClassVar[bool] = False

    def rms(self, shape: tuple[int, ...]) -> float:
        """The root mean square of an update's entries for a full-rank gradient of ``shape``; ``nan`` if unknown."""
        return math.nan

    @property
    def cell(self) -> tuple[str, str]:
        """Row and column in the periodic table: the norm that it comes from, or its own name, and its memory."""
        return type(self).__name__, NO_MEMORY

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """An estimate of the dual norm of each matrix, shape ``(...)``, for step sizes; as cheap as one duality map.

        The norm is the one in which the result has norm 1, or would have norm 1 without memory.

        Raises:
            ValueError: the result is bounded in no norm.
        """
        raise ValueError(f"{self} bounds its result in no norm, so there is no dual norm for the step size to go by")
