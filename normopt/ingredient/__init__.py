"""What an ingredient is: found by name, written as text and read back; the context that it sees at a step."""

from normopt.ingredient.base import Ingredient, Option, check_flag, option, plain
from normopt.ingredient.registry import choices, get, nearest, parse, read
from normopt.ingredient.stage import Context, Stage, coarsest, substate
from normopt.ingredient.traits import like, trait
from normopt.ingredient.validate import check_choice, check_count, check_positive, check_range
from normopt.ingredient.view import View

__all__ = [
    "Context",
    "Ingredient",
    "Option",
    "Stage",
    "View",
    "check_choice",
    "check_count",
    "check_flag",
    "check_positive",
    "check_range",
    "choices",
    "coarsest",
    "get",
    "like",
    "nearest",
    "option",
    "parse",
    "plain",
    "read",
    "substate",
    "trait",
]
