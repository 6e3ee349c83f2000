"""Fetches packages of Debian and unpacks them into a folder; nothing is installed, no root.

The user's own apt is used as configured: its sources say where to fetch from, its proxies and
credentials apply, and it checks every package against the signed index. For another
architecture or release, apt gets a state of its own beside the downloads, in which nothing is
installed, so that it brings all dependencies. Debian replaces packages and removes the old
ones, so an index that an earlier, interrupted run left may name files that are gone: then it is
updated, once.
"""

from __future__ import annotations

import compileall
import os
import pathlib
import py_compile
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace

from edgec.errors import DeviceError
from edgec.targets import Debian

_MERGED = ("bin", "sbin", "lib")  # links into usr/ of a Debian root
_UPDATE = "run apt-get update first"
_LATER = "try again later, or name another server in apt's sources"
_TAR_END = "tar: Exiting with failure status due to previous errors"  # which tell more
_FORMAT = "$(REPO_URI)|$(RELEASE)|$(SIGNED_BY)|$(COMPONENT)"


def fetch_debian(wanted: Debian, downloads: pathlib.Path) -> list[pathlib.Path]:
    """The .deb files of the packages, in ``downloads``.

    With an architecture: all that they depend on, too. With a suite alone: those of another
    release for this machine, by themselves. Raises DeviceError.
    """
    for tool in ("apt-get", "dpkg-deb", "tar"):
        if shutil.which(tool) is None:
            raise DeviceError(f"there is no {tool} on this machine; it needs Debian or Ubuntu")
    packages = wanted.packages
    if not wanted.architecture and not wanted.suite:
        return [_download(package, downloads) for package in packages]
    if not wanted.architecture:
        own = _run(["dpkg", "--print-architecture"], "this machine's architecture", _UPDATE)
        wanted = replace(wanted, architecture=own.strip())
        folder = downloads / f"{wanted.folder}-{wanted.suite}"
        return _with_index(downloads, wanted, lambda o: [_download(p, folder, o) for p in packages])
    return _with_index(downloads, wanted, lambda o: _with_all(wanted, downloads, o))


def unpack_debian(archives: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
    """Unpack .deb files into one root, in which /bin, /sbin and /lib are links into /usr."""
    for name in _MERGED:
        (folder / "usr" / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(f"usr/{name}")
    for archive in archives:
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE
        ) as reader:
            unpack = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(folder)]
            done = subprocess.run(unpack, stdin=reader.stdout, stderr=subprocess.PIPE, text=True)
        if done.returncode or reader.returncode:
            reason = _cause(done.stderr)
            raise DeviceError(f"{archive.name} cannot be unpacked into {folder}: {reason}")
    # an emulated Python takes long to compile; its own version may differ, then it does
    for library in folder.glob("usr/lib/python3.*"):
        compileall.compile_dir(
            library, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )


def _root(downloads: pathlib.Path, wanted: Debian) -> pathlib.Path:
    return downloads / f"apt-{wanted.suite}-{wanted.architecture}"


def _with_index(
    downloads: pathlib.Path,
    wanted: Debian,
    fetch: Callable[[Sequence[str]], list[pathlib.Path]],
) -> list[pathlib.Path]:
    """What ``fetch`` gives with a private apt that knows the packages of the suite.

    fetch: is given the options for that apt; called again after an update of the index if it
    fails with one that is older than this call. Raises DeviceError.
    """
    root = _root(downloads, wanted)
    options = _private_apt(root, wanted)
    if (root / "updated").is_file():
        try:
            return fetch(options)
        except DeviceError:
            (root / "updated").unlink()
    _run(["apt-get", *options, "-qq", "update"], f"Debian {wanted.suite}", _LATER)
    _run(["apt-get", *options, "-qq", "autoclean"], "what is outdated", _LATER)  # old archives
    (root / "updated").touch()
    return fetch(options)


def _with_all(
    wanted: Debian, downloads: pathlib.Path, options: Sequence[str]
) -> list[pathlib.Path]:
    """The packages with what they depend on."""
    command = ["apt-get", *options, "-qq", "-y", "-d", "--no-install-recommends", "install"]
    _run([*command, *wanted.packages], f"Debian {wanted.suite} {wanted.architecture}", _LATER)
    return sorted((_root(downloads, wanted) / "archives").glob("*.deb"))


def _download(package: str, downloads: pathlib.Path, options: Sequence[str] = ()) -> pathlib.Path:
    """One package for this machine, without what it depends on."""
    folder = downloads / package
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob("*.deb")):
        command = ["apt-get", *options, "-qq", "download", package]
        _run(command, f"package {package}", _LATER if options else _UPDATE, folder)
    return max(folder.glob("*.deb"))


def _private_apt(root: pathlib.Path, wanted: Debian) -> list[str]:
    """Options for an apt that knows the user's servers and an empty system."""
    for name in ("state/lists/partial", "archives/partial", "log"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "status").touch()
    uri, keys = _server()
    lines = [
        "Types: deb",
        f"URIs: {uri}",
        f"Suites: {wanted.suite}",
        "Components: main",
        f"Architectures: {wanted.architecture}",
        *([f"Signed-By: {keys}"] if keys else []),
    ]
    (root / "debian.sources").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "APT::Architecture": wanted.architecture,
        "APT::Architectures": wanted.architecture,
        "APT::Default-Release": "",
        "APT::Sandbox::User": "root" if os.geteuid() == 0 else "",
        "Dir::State": root / "state",
        "Dir::State::status": root / "status",
        "Dir::Cache": root,
        "Dir::Cache::archives": root / "archives",
        "Dir::Etc::sourcelist": root / "debian.sources",
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::preferences": "-",
        "Dir::Etc::preferencesparts": "-",
        "Dir::Log": root / "log",
        "Binary::apt-get::APT::Keep-Downloaded-Packages": "true",
        "APT::Keep-Downloaded-Packages": "true",
        "DPkg::Post-Invoke": "",
        "APT::Update::Post-Invoke": "",
    }
    configuration = root / "apt.conf"
    text = "".join(f'{key} "{value}";\n' for key, value in settings.items() if value != "")
    # hooks of the system tidy its own caches; here they would remove what was downloaded
    text = "#clear DPkg::Post-Invoke;\n#clear APT::Update::Post-Invoke;\n" + text
    configuration.write_text(text, encoding="utf-8")
    return ["-c", str(configuration), "-o", f"Dir::Etc::sourcelist={root / 'debian.sources'}"]


def _server() -> tuple[str, str]:
    """URI and keyring of Debian's main archive, as this machine's own sources state them."""
    listed = _run(["apt-get", "indextargets", "--format", _FORMAT], "apt's sources", _UPDATE)
    for line in sorted(set(listed.splitlines())):
        uri, release, keys, component = (line.split("|") + ["", "", ""])[:4]
        if component == "main" and "security" not in release and "security" not in uri:
            return uri, keys if keys.startswith("/") else ""  # old apt does not tell
    raise DeviceError(
        "apt on this machine has no source with the component 'main'; add one of Debian "
        "(sources.list) and run apt-get update"
    )


def _run(command: Sequence[str], what: str, advice: str, folder: pathlib.Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise DeviceError(f"{what} cannot be fetched: {_cause(done.stderr)}; {advice}")
    return done.stdout


def _cause(text: str) -> str:
    """apt's first error (those after it follow from it), else the last that ``text`` tells."""
    lines = [" ".join(line.split()) for line in text.strip().splitlines()]
    lines = [line for line in lines if line != _TAR_END]
    errors = [line.removeprefix("E: ") for line in lines if line.startswith("E: ")]
    return (errors[:1] or lines[-1:] or ["no reason was given"])[0]
