"""Windows programs under wine: ONNX Runtime's Windows library, called from a C program.

The program is ``hosts/run_bundle.c``, compiled once with MinGW and kept with a Windows
folder of its own (a wine prefix) in the device's environment, under the digest of what they
were made from. It opens no window and no connection. The CPU is this machine's.

Left out on purpose: 32-bit programs, Windows on ARM, other compilers than MinGW.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

from edgec.devices.job import Device, Job, Outcome, last_line, read_outcome, write_job
from edgec.devices.local import clean_environment, execute
from edgec.errors import DeviceError
from edgec.targets import Profile

HOSTS = pathlib.Path(__file__).with_name("hosts")
SOURCES = ("run_bundle.c", "edgec_bundle.c", "edgec_json.c", "edgec_machine.c", "edgec_model.c",
           "edgec_sha256.c")  # fmt: skip
INCLUDE = "headers/usr/include/onnxruntime"  # of an environment
_COMPILED = (*SOURCES, "wine_amx.c")
_LIBRARY = "site/onnxruntime/capi/onnxruntime.dll"
_COMPILER = "x86_64-w64-mingw32-gcc"
_TIMEOUT_S = 600.0
_PROGRAM, _PREFIX = "run_bundle.exe", "prefix"
_BUILTIN = ("/usr/lib/*/wine", "/usr/lib/wine", "/opt/wine-*/lib/wine", "/opt/wine-*/lib64/wine")


class Wine(Device):
    """Runs every job in a folder that is removed afterwards. built: program and prefix."""

    def __init__(self, profile: Profile, built: pathlib.Path, library: pathlib.Path) -> None:
        """Nothing is started yet."""
        self.profile = profile
        self._program = built / _PROGRAM
        self._environment = _environment(built / _PREFIX)
        self._environment["WINEPATH"] = "Z:" + str(library.parent).replace("/", "\\")

    def run(self, job: Job) -> Outcome:
        """Run a job. Raises DeviceError if the program fails."""
        with tempfile.TemporaryDirectory(prefix="edgec-") as name:
            folder = pathlib.Path(name)
            write_job(job, folder)
            # the folder's name may have letters that a Windows program cannot be given
            command = ["env", "-C", name, "wine", str(self._program), "."]
            log = execute(command, self._environment, self.profile.name)
            return read_outcome(job, folder, self.profile, log)


def open_wine(profile: Profile, folder: pathlib.Path) -> Wine:
    """The device. folder: its environment, with headers/ and site/.

    Raises DeviceError if the program cannot be compiled or wine cannot be started.
    """
    library = folder / _LIBRARY
    command = [_COMPILER, "-std=gnu11", "-O2", "-isystem", str(folder / INCLUDE)]
    command += [str(HOSTS / name) for name in _COMPILED]
    built = folder / f"built-{_digest()}"
    if not built.is_dir():
        _build([*command, str(library)], built, profile.name)
    return Wine(profile, built, library)


def _build(command: Sequence[str], goal: pathlib.Path, device: str) -> None:
    """Compile the program and make a prefix; both appear at once, or not at all."""
    made = pathlib.Path(tempfile.mkdtemp(prefix="building-", dir=goal.parent))
    try:
        _checked([*command, "-o", str(made / _PROGRAM)], clean_environment(), device)
        _checked(["wine", "wineboot", "--init"], _environment(made / _PREFIX), device)
        _checked(["wineserver", "-w"], _environment(made / _PREFIX), device)  # it writes at its end
        _share_libraries(made / _PREFIX)
        for older in goal.parent.glob("built-*"):
            shutil.rmtree(older, ignore_errors=True)
        made.rename(goal)
    except OSError as error:
        if not goal.is_dir():  # else another process was faster
            raise DeviceError(
                f"device {device}: {goal.parent} cannot be written: {error.strerror or error}"
            ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _checked(command: Sequence[str], environment: dict[str, str], device: str) -> None:
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=_TIMEOUT_S)
    except OSError as error:
        raise DeviceError(
            f"device {device}: {command[0]} cannot be started: {error.strerror or error}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise DeviceError(
            f"device {device}: {command[0]} did not end within {_TIMEOUT_S:.0f} s"
        ) from error
    if done.returncode:
        text = done.stderr.decode("utf-8", "replace")
        raise DeviceError(f"device {device}: {command[0]} failed: {last_line(text)}")


def _environment(prefix: pathlib.Path) -> dict[str, str]:
    """No window, no messages, no browser engine, no debugger, no entries in the user's menus."""
    absent = "mscoree,mshtml,winedbg.exe,winemenubuilder.exe="
    ours = {"WINEPREFIX": str(prefix), "WINEDEBUG": "-all", "WINEDLLOVERRIDES": absent}
    kept = clean_environment()
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        kept.pop(name, None)
    return {**kept, **ours, "WINEARCH": "win64"}


def _share_libraries(prefix: pathlib.Path) -> None:
    """Links instead of the copies of wine's own libraries: 13 MB instead of 690.

    The prefix is never updated, so that nothing is ever written through a link.
    """
    originals = {
        path.name: path
        for pattern in _BUILTIN
        for folder in pathlib.Path("/").glob(f"{pattern[1:]}/x86_64-windows")
        for path in folder.iterdir()
    }
    for path in (prefix / "drive_c").rglob("*"):
        original = originals.get(path.name)
        if original is None or path.is_symlink() or not path.is_file():
            continue
        if filecmp.cmp(path, original, shallow=False):
            path.unlink()
            path.symlink_to(original)
    (prefix / ".update-timestamp").write_text("disable\n", encoding="utf-8")


def _digest() -> str:
    """Of everything that the program and the prefix are made from but the environment."""
    version = subprocess.run(
        ["wine", "--version"], env={**os.environ, "WINEDEBUG": "-all"}, capture_output=True
    )
    digest = hashlib.sha256(version.stdout)
    for path in sorted([*HOSTS.glob("edgec_*.h"), *(HOSTS / name for name in _COMPILED)]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
