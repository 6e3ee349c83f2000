"""Targets: what a device can do, as data.

A target is a TOML file of capabilities; passes ask it for a capability and never for its
name, so that a new device is a new file. ``load_target`` reads a shipped one by name or
any one by path, and refuses unknown keys. Device profiles (``profiles/``) say how a device
is run here, environments (``environments/``) what has to be fetched for that.
"""

from edgec.targets.loader import (
    TargetError,
    load_environment,
    load_profile,
    load_target,
    profile_names,
    target_names,
)
from edgec.targets.profile import Debian, Environment, File, Modules, Profile, Wheels
from edgec.targets.schema import Float16, Int4, Int8, Recipes, Session, Target

__all__ = [
    "Debian",
    "Environment",
    "File",
    "Float16",
    "Int4",
    "Int8",
    "Modules",
    "Profile",
    "Recipes",
    "Session",
    "Target",
    "TargetError",
    "Wheels",
    "load_environment",
    "load_profile",
    "load_target",
    "profile_names",
    "target_names",
]
