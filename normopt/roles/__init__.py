"""The role of every tensor of a model, how it is seen as a matrix, and which norm the role gets."""

from normopt.roles.geometries import GEOMETRIES, width_scaled
from normopt.roles.groups import param_groups
from normopt.roles.infer import infer_roles
from normopt.roles.modules import Role
from normopt.roles.options import ROLES, Geometry

__all__ = ["GEOMETRIES", "ROLES", "Geometry", "Role", "infer_roles", "param_groups", "width_scaled"]
