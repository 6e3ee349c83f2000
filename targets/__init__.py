"""Targets: what a device can do, as data.

A target is a TOML file of capabilities; passes ask it for a capability and never for its
name, so that a new device is a new file. ``load_target`` reads a shipped one by name or
any one by path, and refuses unknown keys.
"""

from edgec.targets.loader import TargetError, load_target, target_names
from edgec.targets.schema import Float16, Int4, Int8, Recipes, Session, Target

__all__ = [
    "Float16",
    "Int4",
    "Int8",
    "Recipes",
    "Session",
    "Target",
    "TargetError",
    "load_target",
    "target_names",
]
