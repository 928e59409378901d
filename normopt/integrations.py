"""What trainers of other libraries ask for; docs/integrations.md shows the rest, which need nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from normopt.ingredient import nearest
from normopt.optimizer import SteepestDescent
from normopt.zoo import create, list_optimizers

#: Called without arguments, it returns a function of the model and options that returns the optimizer.
Factory = Callable[[], Callable[..., SteepestDescent]]


def for_trainer(name: str, **options: Any) -> tuple[Factory, dict[str, Any]]:
    """The argument ``optimizer_cls_and_kwargs`` of Hugging Face's ``Trainer``, for :func:`normopt.create`.

    Given an optimizer's class, ``Trainer`` builds two param groups of its own and roles are lost. Given anything else
    it calls ``factory()(model, **options)`` (transformers 5, ``Trainer.create_optimizer``), and every tensor of the
    model gets the norm of its role: ``Trainer(model, args, optimizer_cls_and_kwargs=for_trainer("muon", lr=0.02))``.

    Args:
        name: one of :func:`normopt.list_optimizers`, in any case.
        options: arguments of the optimizer's class. The learning rate and the decay of ``TrainingArguments`` are not
            passed on: give them here. ``Trainer`` still makes the schedule and clips gradients to ``max_grad_norm``.

    Returns:
        A factory and its options. Nothing is built before ``Trainer`` has put the model where it belongs.

    Raises:
        ValueError: unknown name; the message holds the nearest one.
        TypeError: the name is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"for_trainer(name): name must be one of list_optimizers(), got {type(name).__name__}")
    if name.lower() not in list_optimizers():
        raise ValueError(f"unknown optimizer {name!r}; {nearest(name.lower(), list_optimizers())}")
    return partial(partial, create, name), options
