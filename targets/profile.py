"""Device profiles: how a device is run here, as data; and what has to be fetched for it.

A profile names a CPU or an engine and the runner that executes bundles on it; an environment
lists the packages that one or several profiles need. The field names are the TOML keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from edgec.targets.schema import Arch

# native: this machine's Python. qemu: user-mode emulation of a Linux program.
# provider: a Python environment of its own with another onnxruntime package.
# node, chromium: onnxruntime-web in Node.js or in a browser. wine: a Windows program.
# convert: converted and checked only, never executed.
Runner = Literal["native", "qemu", "provider", "node", "chromium", "wine", "convert"]


@dataclass(frozen=True)
class Profile:
    """One device, or an emulation of it, on which a bundle can be run."""

    name: str
    description: str  # one line for people
    arch: Arch  # instruction set that bundles must be built for
    os: tuple[str, ...]  # operating systems whose bundles it stands for
    features: tuple[str, ...]  # CPU features that the device has; none where cpu is "host"
    runner: Runner
    environment: str = ""  # what has to be fetched; empty: nothing
    host: str = ""  # instruction set that this machine must have; empty: any
    programs: tuple[str, ...] = ()  # that must be on this machine's PATH, as the environment's
    emulator: str = "host"  # folder of the environment that the emulator is in
    cpu: str = ""  # the emulator's CPU model, with its options; "host": this machine's own CPU
    providers: tuple[str, ...] = ("CPUExecutionProvider",)  # execution providers that run
    provider_options: Mapping[str, str] = field(default_factory=dict)  # of the first of them
    enough_db: int = 40  # SQNR above which losing some of it does not count: CPUs differ as much
    counts: bool = False  # True where executed instructions can be counted
    ci: bool = False  # True for the profiles that `.ci/run` verifies on
    note: str = ""  # what a run there proves, and what it does not


@dataclass(frozen=True)
class Debian:
    """Packages of Debian, unpacked into ``folder`` of the environment without being installed."""

    folder: str
    packages: tuple[str, ...]
    architecture: str = ""  # Debian's name of it; empty: this machine's
    suite: str = ""  # release the packages are taken from; empty: this machine's


@dataclass(frozen=True)
class Wheels:
    """Python packages for another platform, unpacked into ``folder`` of the environment."""

    folder: str
    requirements: tuple[str, ...]
    python: str = ""  # version, e.g. "3.11"; empty: this Python
    platforms: tuple[str, ...] = ()  # of the wheels; empty: this machine's


@dataclass(frozen=True)
class Modules:
    """Packages of npm, installed into ``folder`` of the environment without their scripts."""

    folder: str
    packages: tuple[str, ...]  # name@version


@dataclass(frozen=True)
class File:
    """A small text file that an environment needs besides its packages."""

    path: str  # below the environment, in one of its folders
    text: str


@dataclass(frozen=True)
class Environment:
    """What has to be fetched before the profiles that name it can run."""

    name: str
    description: str
    size_mb: int  # on disk, about
    programs: tuple[str, ...] = ()  # that must be on this machine's PATH
    debian: tuple[Debian, ...] = ()
    wheels: tuple[Wheels, ...] = ()
    modules: tuple[Modules, ...] = ()
    files: tuple[File, ...] = ()
