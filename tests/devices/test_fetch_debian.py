"""Debian packages of another release: an old index is updated once, and errors are one line."""

from __future__ import annotations

import hashlib
import pathlib
import shutil
import subprocess
from collections.abc import Callable

import pytest

from edgec.devices import fetch_debian as fetching
from edgec.devices.fetch_debian import fetch_debian, unpack_debian
from edgec.errors import DeviceError
from edgec.targets import Debian

GONE = (
    "E: Failed to fetch http://server/pool/a_1_all.deb  404  Not Found [IP: 192.0.2.1 80]\n"
    "E: Unable to fetch some archives, maybe run apt-get update or try with --fix-missing?\n"
)
WANTED = Debian("root", ("a", "b"), architecture="amd64", suite="stable")


class Apt:
    """Stands for apt-get: notes what it is asked, fails with ``fails`` until it was updated."""

    def __init__(self, fails: str, heals: bool) -> None:
        self.asked: list[str] = []
        self._fails, self._heals = fails, heals

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if command[0] == "dpkg":
            return subprocess.CompletedProcess(command, 0, "amd64\n", "")
        [asked] = {"update", "install", "download", "autoclean"} & {*command}
        self.asked.append(asked)
        healed = self._heals and "update" in self.asked
        failed = asked in ("install", "download") and not healed
        if asked == "download" and not failed:
            pathlib.Path(str(options["cwd"]), "a.deb").touch()
        return subprocess.CompletedProcess(command, 100 * failed, "", self._fails * failed)


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Apt]:
    def make(fails: str, *, heals: bool) -> Apt:
        apt = Apt(fails, heals)
        monkeypatch.setattr(subprocess, "run", apt)
        monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(fetching, "_server", lambda: ("http://server", ""))
        return apt

    return make


def leave_index(downloads: pathlib.Path) -> pathlib.Path:
    """What an interrupted installation leaves."""
    root = downloads / "apt-stable-amd64"
    root.mkdir(parents=True)
    (root / "updated").touch()
    return root


def test_an_index_of_this_run_is_made_once_and_used(
    pretend: Callable[..., Apt], tmp_path: pathlib.Path
) -> None:
    apt = pretend(GONE, heals=True)
    fetch_debian(WANTED, tmp_path)
    fetch_debian(WANTED, tmp_path)
    assert apt.asked == ["update", "autoclean", "install", "install"]


def test_an_old_index_that_names_what_is_gone_is_updated_once(
    pretend: Callable[..., Apt], tmp_path: pathlib.Path
) -> None:
    leave_index(tmp_path)
    apt = pretend(GONE, heals=True)
    fetch_debian(WANTED, tmp_path)
    assert apt.asked == ["install", "update", "autoclean", "install"]


def test_packages_without_their_dependencies_are_tried_again_too(
    pretend: Callable[..., Apt], tmp_path: pathlib.Path
) -> None:
    leave_index(tmp_path)
    apt = pretend(GONE, heals=True)
    [archive] = fetch_debian(Debian("host", ("a",), suite="stable"), tmp_path)
    assert archive.name == "a.deb"
    assert apt.asked == ["download", "update", "autoclean", "download"]


def test_what_stays_gone_is_one_clear_line(
    pretend: Callable[..., Apt], tmp_path: pathlib.Path
) -> None:
    root = leave_index(tmp_path)
    apt = pretend(GONE, heals=False)
    with pytest.raises(DeviceError) as caught:
        fetch_debian(WANTED, tmp_path)
    assert str(caught.value) == (
        "Debian stable amd64 cannot be fetched: Failed to fetch http://server/pool/a_1_all.deb "
        "404 Not Found [IP: 192.0.2.1 80]; try again later, or name another server in apt's "
        "sources"
    )
    assert apt.asked == ["install", "update", "autoclean", "install"]
    assert (root / "updated").is_file()  # the index is new


def publish(server: pathlib.Path, version: int) -> None:
    """An archive of Debian with the packages a and b in this version alone."""
    shutil.rmtree(server, ignore_errors=True)
    index = server / "dists" / "stable" / "main" / "binary-amd64" / "Packages"
    index.parent.mkdir(parents=True)
    text = ""
    for name in ("a", "b"):
        control = server / name / "DEBIAN" / "control"
        control.parent.mkdir(parents=True)
        fields = f"Package: {name}\nVersion: {version}\nArchitecture: all\n"
        control.write_text(f"{fields}Maintainer: nobody <a@b>\nDescription: none\n")
        archive = f"{name}_{version}_all.deb"
        build = ["dpkg-deb", "--root-owner-group", "--build", name, archive]
        subprocess.run(build, cwd=server, check=True, capture_output=True)
        data = (server / archive).read_bytes()
        text += f"{fields}Filename: {archive}\nSize: {len(data)}\n"
        text += f"SHA256: {hashlib.sha256(data).hexdigest()}\n\n"
    index.write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    release = f"Suite: stable\nCodename: stable\nDate: Thu, 0{version} Jan 2026 00:00:00 UTC\n"
    release += f"SHA256:\n {digest} {len(text)} main/binary-amd64/Packages\n"
    (server / "dists" / "stable" / "Release").write_text(release)


@pytest.mark.skipif(
    not (shutil.which("apt-get") and shutil.which("dpkg-deb")), reason="needs Debian's apt-get"
)
def test_apt_brings_the_packages_that_replaced_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    server, downloads = tmp_path / "server", tmp_path / "downloads"
    unsigned = tmp_path / "apt.conf"
    unsigned.write_text(
        'Acquire::AllowInsecureRepositories "true";\nAPT::Get::AllowUnauthenticated "true";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(unsigned))
    monkeypatch.setattr(fetching, "_server", lambda: (f"copy:{server}", ""))
    publish(server, 1)
    first = fetch_debian(Debian("root", ("a",), architecture="amd64", suite="stable"), downloads)
    assert [archive.name for archive in first] == ["a_1_all.deb"]
    publish(server, 2)
    fetched = fetch_debian(WANTED, downloads)
    assert [archive.name for archive in fetched] == ["a_2_all.deb", "b_2_all.deb"]
    shutil.rmtree(server)
    for archive in fetched:
        archive.unlink()
    with pytest.raises(DeviceError, match=r"^[^\n]*; try again later, or name another[^\n]*$"):
        fetch_debian(WANTED, downloads)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_a_full_disk_is_told_with_the_folder(tmp_path: pathlib.Path) -> None:
    control = tmp_path / "a" / "DEBIAN" / "control"
    control.parent.mkdir(parents=True)
    control.write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: nobody <a@b>\nDescription: none\n"
    )
    for name in ("large", "second"):
        (tmp_path / "a" / name).write_bytes(bytes(1 << 20))
    build = ["dpkg-deb", "--root-owner-group", "--build", "a", "a.deb"]
    subprocess.run(build, cwd=tmp_path, check=True, capture_output=True)
    small = tmp_path / "small"
    small.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        wanted = f"a.deb cannot be unpacked into {small}/root: .*No space left on device"
        with pytest.raises(DeviceError, match=wanted):
            unpack_debian([tmp_path / "a.deb"], small / "root")
    finally:
        subprocess.run(["umount", str(small)], check=True)
