"""Stages: a tensor in, a tensor out. What momenta and directions have in common, and what they can see."""

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
    """What the ingredients of one batch can see at one step, beside what they are handed; nothing in it is written to.

    Args:
        g: the gradient as memories should see it: after L2 and the step size's weight; inside a ``Chain``, the result
            of the stage before.
        raw: the gradient as it came.
        step: the number of this step, counted from 1; a 0-dimensional tensor of the device in ``capturable`` steps.
        rate: the learning rate, as the step size sees it.
        direction: the rule's direction, resolved.
        weights: how to get the weights.
        scale: what the step size has multiplied ``g`` by, so that an ``eps`` can follow.
        shared: what the step size has concluded from all batches: floats where reading a number is free, else
            0-dimensional tensors.
        shrink: what the weights are multiplied by before the update is added, a number or a tensor that broadcasts to
            them.
        is_vector: whether these are vectors or scalars, seen as matrices with one row.
        past: how to get ``previous``; ``None`` if there is none.
        dtype: the dtype of the parameters; ``None`` if it is the dtype of the weights here.
        first: the place of the first entry in the parameter, where a large one is worked through in parts.
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
    first: int = 0
    _held: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def previous(self) -> Tensor:
        """The gradient of this step's sample at the weights before the last step, for momenta that look back."""
        if self.past is None:
            raise ValueError("there is no gradient at the previous weights: only a rule's momentum can look back")
        return self._once("previous", self.past)

    @property
    def w(self) -> Tensor:
        """The weights before the step, shape ``(..., out, in)``, gathered when first asked for; never modified."""
        return self._once("w", self.weights)

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in self._held:  # compilers do not see through functools.cached_property
            self._held[name] = make()
        return self._held[name]

    def unscaled(self, x: Tensor) -> Tensor:
        """``x``, a gradient or an average of them, without the step size's factor ``scale``."""
        return x if isinstance(self.scale, float) and self.scale == 1.0 else x / self.scale

    def seeing(self, x: Tensor) -> Context:
        """The same for the next stage of a chain, whose gradient is ``x``."""
        return dataclasses.replace(self, g=x, weights=lambda: self.w, scale=1.0)

    def through(self, view: Callable[[Tensor], Tensor]) -> Context:
        """The same in other coordinates: gradient and weights as ``view`` shows them."""
        g = view(self.g)
        return dataclasses.replace(self, g=g, raw=g, weights=lambda: view(self.w))


class Stage(Ingredient):
    """A tensor in, a tensor out, with state in between: what momenta and directions have in common.

    ``reduces`` says what one entry of the result depends on: ``"entry"``, ``"row"``, ``"column"``, ``"all"`` (sums over
    the whole matrix) or ``"matrix"`` (anything, the default). Entry-wise stages are run on many tensors laid end to
    end, the others on stacks of matrices of one shape.
    """

    reduces: ClassVar[str] = "matrix"
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

    @property
    def averages(self) -> frozenset[str]:
        """Names of its state, without a number at the end, that ``state_dtype`` may keep in fewer bits.

        Those are averages whose rounding errors fade: no sums of a whole run, nothing that is subtracted from another
        or compared with it, no matrices that roots are taken of, no bases.
        """
        return frozenset()

    @property
    def takes_vectors(self) -> bool:
        """Whether vectors and scalars, seen as one row, are taken too."""
        return not self.needs_matrix

    def init_state(self, x: Tensor) -> dict[str, Tensor]:
        """The state before the first step for a batch ``x`` of shape ``(..., out, in)``; leading dimensions stay."""
        return {}

    def look(self, g: Tensor, state: dict[str, Tensor]) -> None:
        """Prepare the state from the first gradient; only called if ``looks_first``."""

    def __call__(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """Map ``x`` to the next stage's input.

        Args:
            x: what the stage before returned, shape ``(..., out, in)``; never modified.
            state: this stage's tensors, updated in place.
            context: what else there is to see; nothing in it may be modified.
        """
        raise NotImplementedError

    def apply(self, x: Tensor, state: dict[str, Tensor], context: Context) -> Tensor:
        """Map ``x`` with the state as it stands, which is left as it is. A stage with state must say how."""
        return self(x, state, context)


def coarsest(levels: Iterable[str]) -> str:
    """What a composition of stages ``reduces``: the common level of all that are not entry-wise, else ``"matrix"``."""
    distinct = {level for level in levels if level != "entry"}
    return distinct.pop() if len(distinct) == 1 else "matrix" if distinct else "entry"


def substate(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of ``state`` whose names begin with ``prefix``, under the names without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


#: The columns of the periodic table.
NO_MEMORY, SECOND_MOMENT, ROTATED = "no memory", "second moment", "second moment, rotated"


class Direction(Stage):
    """Which direction is steepest: a :class:`Norm`, or an algebra over norms (``normopt.directions``)."""

    #: Whether the length of the result is the direction's own; where not, a chain looks at the stage before.
    sets_length: ClassVar[bool] = True
    #: Whether the direction commutes with orthonormal changes of basis of rows and of columns.
    rotation_invariant: ClassVar[bool] = False

    def rms(self, shape: tuple[int, ...]) -> float:
        """The root mean square of an update's entries for a full-rank gradient of ``shape``; ``nan`` if unknown."""
        return math.nan

    @property
    def cell(self) -> tuple[str, str]:
        """Where it stands in the periodic table: the norm that it comes from, and its memory; else its own name."""
        return type(self).__name__, NO_MEMORY

    def steepness(self, g: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """The dual norm of each matrix, shape ``(...)``, for step sizes: at most the cost of one duality map.

        The norm is the one in which the result has norm 1, or had it if the direction were without memory.
        """
        raise ValueError(f"{self} bounds its result in no norm, so there is no dual norm for the step size to go by")
