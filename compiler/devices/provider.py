"""Devices that this machine stands for with another onnxruntime package, in its own Python.

Packages that bring an execution provider replace onnxruntime or pin it, so each lives in a
folder of its own and not beside the user's: the interpreter starts without site-packages.
"""

from __future__ import annotations

import json
import pathlib
import sys

from edgec.devices import guest
from edgec.devices.local import LocalPython
from edgec.targets import Profile

_SITE = "site"  # folder of an environment


def open_provider(profile: Profile, folder: pathlib.Path) -> LocalPython:
    """The device. folder: its environment, with the packages in site/."""
    options = {profile.providers[0]: dict(profile.provider_options)}
    return LocalPython(
        profile,
        [sys.executable, "-S"],
        path=[str(folder / _SITE)],
        environment={guest.OPTIONS: json.dumps(options)},
    )
