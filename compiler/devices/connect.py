"""From the name of a device to the device: a profile, or an address of a real one."""

from __future__ import annotations

import pathlib

from edgec.devices.job import Device
from edgec.errors import DeviceMissingError, TargetError
from edgec.targets import Profile, load_profile


def open_device(text: str) -> Device:
    """The device ``text``, ready to run jobs.

    text: the name of a profile or a path to a profile's .toml file; ``native``;
    ``ssh://user@host[:port]``; ``adb:`` or ``adb:SERIAL``.
    Raises TargetError for an unknown profile, DeviceMissingError if it is not installed,
    DeviceError if it cannot be reached.
    """
    if text == "native":
        from edgec.devices.local import open_native

        return open_native()
    if text.startswith("ssh://"):
        from edgec.devices.ssh import open_ssh

        return open_ssh(text)
    if text.startswith("adb:"):
        from edgec.devices.adb import open_adb

        return open_adb(text)
    profile = load_profile(text)
    return _open(profile, _installed(profile))


def check_name(text: str) -> None:
    """Raise TargetError if ``text`` names no device; whether it can be reached is not asked."""
    if text != "native" and not text.startswith(("ssh://", "adb:")):
        load_profile(text)


def _open(profile: Profile, folder: pathlib.Path) -> Device:
    """folder: what was fetched for the profile's environment."""
    if profile.runner == "qemu":
        from edgec.devices.qemu import open_emulator

        return open_emulator(profile, folder)
    if profile.runner == "provider":
        from edgec.devices.provider import open_provider

        return open_provider(profile, folder)
    if profile.runner == "node":
        from edgec.devices.web import open_node

        return open_node(profile, folder)
    if profile.runner == "chromium":
        from edgec.devices.web import open_chromium

        return open_chromium(profile, folder)
    if profile.runner == "wine":
        from edgec.devices.wine import open_wine

        return open_wine(profile, folder)
    if profile.runner == "convert":
        from edgec.devices.convert import open_converter

        return open_converter(profile, folder)
    raise TargetError(
        f"profile {profile.name}: its runner '{profile.runner}' is this machine itself; give "
        "`--on native`"
    )


def _installed(profile: Profile) -> pathlib.Path:
    from edgec.devices.install import installed_folder, missing

    reason = missing(profile)
    if reason is not None:
        raise DeviceMissingError(f"device {profile.name}: {reason}")
    return installed_folder(profile)
