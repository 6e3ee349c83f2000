"""Installs what device profiles need into a cache, and says what is missing.

    CACHE/NAME/            one environment, shared by the profiles that name it
    CACHE/NAME/installed.json   written last: the environment's digest, digests of its folders;
                                that of wheels for this Python depends on its version, too
    CACHE/NAME.downloads/  archives, kept until the environment is complete

CACHE is $EDGEC_DEVICES, or ``devices`` in edgec's cache folder. An interrupted
installation goes on where it stopped; an environment appears complete or not at all. Once
installed, nothing is fetched again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from edgec.cache import user_cache
from edgec.devices.fetch_debian import fetch_debian, unpack_debian
from edgec.devices.fetch_packages import (
    fetch_modules,
    fetch_wheels,
    own_python,
    unpack_wheels,
)
from edgec.errors import DeviceError, TargetError
from edgec.machine import this_machine
from edgec.targets import Environment, Profile, load_environment, load_profile, profile_names

Progress = Callable[[str, int, int], None]

_STAMP = "installed.json"


def cache_folder() -> pathlib.Path:
    """Where environments are kept."""
    given = os.environ.get("EDGEC_DEVICES")
    return pathlib.Path(given) if given else user_cache() / "devices"


def installed_folder(profile: Profile) -> pathlib.Path:
    """The folder of the profile's environment, whether it is there or not."""
    return cache_folder() / profile.environment


def missing(profile: Profile) -> str | None:
    """Why the profile cannot be used on this machine, and what to do; None if it can."""
    if not profile.environment:
        return None
    arch = this_machine().arch
    if profile.host and profile.host != arch:
        return f"it needs a machine with {profile.host}, this one is {arch}; use another machine"
    environment = load_environment(profile.environment)
    needed = (*environment.programs, *profile.programs)
    absent = [program for program in needed if shutil.which(program) is None]
    if absent:
        return f"there is no {' and no '.join(absent)} on this machine; install it (apt, brew, …)"
    stamp = _read_stamp(cache_folder() / environment.name)
    if stamp is None:
        return f"it is not installed; run: edgec devices install {profile.name}"
    if stamp.get("environment") != _digest_of(environment):
        why = "it was installed by another edgec or for another Python"
        return f"{why}; run: edgec devices install {profile.name}"
    return None


def install(name: str, progress: Progress = lambda what, done, total: None) -> pathlib.Path:
    """Install what the profile ``name`` needs; the folder of its environment.

    What is there already is checked by its digests and made anew if it was altered.
    Raises TargetError for an unknown profile, DeviceError if something cannot be fetched.
    """
    profile = load_profile(name)
    if not profile.environment:
        return cache_folder()
    environment = load_environment(profile.environment)
    folder = cache_folder() / environment.name
    try:
        if _is_intact(folder, environment):
            return folder
        _install(environment, folder, progress)
    except OSError as error:
        raise DeviceError(
            f"device {name}: its files cannot be written below {cache_folder()}: "
            f"{error.strerror or error}; EDGEC_DEVICES names another folder"
        ) from error
    except DeviceError as error:
        raise DeviceError(f"device {name}: {error}") from error
    return folder


def installed_names() -> tuple[str, ...]:
    """The profiles that can be used on this machine, sorted."""
    return tuple(name for name in profile_names() if missing(load_profile(name)) is None)


def names_to_install(names: tuple[str, ...]) -> tuple[str, ...]:
    """The profiles that are meant: every one for ``all``, those of `.ci/run` for ``ci``."""
    if names == ("all",):
        return tuple(n for n in profile_names() if load_profile(n).environment)
    if names == ("ci",):
        return tuple(n for n in profile_names() if load_profile(n).ci)
    for name in names:
        if name in ("all", "ci"):
            raise TargetError(f"'{name}' means several devices; give it alone")
        load_profile(name)
    return names


def tree_digest(folder: pathlib.Path) -> str:
    """sha256 over the paths and contents of all files and links below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            digest.update(f"{name} -> {os.readlink(path)}\n".encode())
        elif path.is_file():
            with open(path, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{name} {content}\n".encode())
    return digest.hexdigest()


def _is_intact(folder: pathlib.Path, environment: Environment) -> bool:
    """True if this edition of the environment is there and no file was altered."""
    stamp = _read_stamp(folder)
    if stamp is None or stamp.get("environment") != _digest_of(environment):
        return False
    return all(tree_digest(folder / n) == digest for n, digest in stamp["folders"].items())


def _install(environment: Environment, folder: pathlib.Path, progress: Progress) -> None:
    downloads = folder.with_name(f"{folder.name}.downloads")
    downloads.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    parts = len(environment.debian) + len(environment.wheels) + len(environment.modules)
    done, what = 0, f"install {environment.name}"
    progress(what, done, parts)
    try:
        for debian in environment.debian:
            unpack_debian(fetch_debian(debian, downloads), partial / debian.folder)
            progress(what, done := done + 1, parts)
        for wheels in environment.wheels:
            unpack_wheels(fetch_wheels(wheels, downloads), partial / wheels.folder)
            progress(what, done := done + 1, parts)
        for modules in environment.modules:
            fetch_modules(modules, partial / modules.folder)
            progress(what, done := done + 1, parts)
        partial.mkdir(exist_ok=True)
        for file in environment.files:
            (partial / file.path).parent.mkdir(parents=True, exist_ok=True)
            (partial / file.path).write_text(file.text, encoding="utf-8")
        stamp = {
            "environment": _digest_of(environment),
            "folders": {p.name: tree_digest(p) for p in sorted(partial.iterdir())},
        }
        (partial / _STAMP).write_text(json.dumps(stamp, sort_keys=True), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(downloads, ignore_errors=True)


def _digest_of(environment: Environment) -> str:
    facts = dataclasses.asdict(environment)
    if any(not wheels.python for wheels in environment.wheels):
        facts["own python"] = own_python()  # its wheels fit no other
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_stamp(folder: pathlib.Path) -> dict[str, Any] | None:
    try:
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stamp if isinstance(stamp, dict) else None
