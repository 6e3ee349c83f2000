"""Linux programs of another CPU under qemu's user-mode emulation.

The guest is the Python and the ONNX Runtime that the device itself would use, a wheel's or
Debian's, so the kernels that run are the device's. Some hundred times slower than the CPU:
times mean nothing.
"""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import sys
import tempfile

from edgec.devices.counter import open_counter
from edgec.devices.local import LocalPython, clean_environment
from edgec.errors import DeviceMissingError, TargetError
from edgec.targets import Profile
from edgec_runtime.machine import X86_FLAGS as FLAGS

_PROGRAMS = {
    "x86_64": "qemu-x86_64",
    "arm64": "qemu-aarch64",
    "armhf": "qemu-arm",
    "riscv64": "qemu-riscv64",
}
_NEWER = ("avx512", "avx_vnni", "amx")  # no emulated CPU has them
_COMPILED = "PYTHONPYCACHEPREFIX"  # Python's variable for the folder of compiled modules
_BLAS = ("blas", "lapack")
ROOT, SITE = "root", "site"  # folders of an environment


def open_emulator(profile: Profile, folder: pathlib.Path) -> LocalPython:
    """The emulated device. folder: its environment, with root/, host/ and maybe site/.

    Without a root/ the guest is this machine's own Python, for an older CPU of its kind.
    """
    program, libraries = _program(profile, folder / profile.emulator)
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}  # the same counts
    if libraries:
        environment["LD_LIBRARY_PATH"] = libraries
    root, held = folder / ROOT, contextlib.ExitStack()
    if root.is_dir():
        python, path = str(_python(root)), [str(folder / SITE)]
        if not (folder / SITE).is_dir():  # Debian's modules are not compiled: 8 s at each start
            environment |= {"PYTHONDONTWRITEBYTECODE": "", _COMPILED: str(folder / "compiled")}
    else:
        python, path = sys.executable, []
        root = pathlib.Path(held.enter_context(tempfile.TemporaryDirectory(prefix="edgec-")))
        _write_cpuinfo(root / "proc" / "cpuinfo", profile)
    guest, counter = ["-cpu", profile.cpu, "-L", str(root), *_alternatives(root), python], None
    if profile.counts:
        nothing, variables = [*guest, "-c", ""], {**clean_environment(), **environment}
        counter = open_counter(profile.arch, program, nothing, variables)
    return LocalPython(
        profile,
        [program, *guest],
        path=path,
        environment=environment,
        counter=counter,
        held=held,
    )


def _write_cpuinfo(path: pathlib.Path, profile: Profile) -> None:
    """This machine's /proc/cpuinfo without the features that the profile lacks.

    The emulator shows a guest the host's file, and edgec_runtime reads features there.
    """
    lacking = {flag for flag, name in FLAGS.items() if name not in profile.features}
    lines = []
    for line in pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, colon, flags = line.partition(":")
        if key.strip() == "flags":
            kept = [f for f in flags.split() if f not in lacking and not f.startswith(_NEWER)]
            flags = " " + " ".join(kept)
        lines.append(f"{key}{colon}{flags}")
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _program(profile: Profile, host: pathlib.Path) -> tuple[str, str]:
    """The emulator, and the folders of the libraries that it needs."""
    if profile.arch not in _PROGRAMS:
        known = ", ".join(_PROGRAMS)
        raise TargetError(
            f"profile {profile.name}: arch is {profile.arch}; runner qemu has {known}"
        )
    name = _PROGRAMS[profile.arch]
    unpacked = host / "usr" / "bin" / name
    if unpacked.is_file():
        return str(unpacked), ":".join(map(str, sorted(host.glob("usr/lib/*-linux-gnu"))))
    found = shutil.which(name)
    if found is None:
        raise DeviceMissingError(f"device {profile.name}: there is no {name}; install qemu-user")
    return found, ""


def _alternatives(root: pathlib.Path) -> list[str]:
    """Options that show the guest Debian's BLAS, to which only an installation makes links."""
    found = [str(path) for name in _BLAS for path in root.glob(f"usr/lib/*/{name}")]
    return ["-E", f"LD_LIBRARY_PATH={':'.join(found)}"] if found else []


def _python(root: pathlib.Path) -> pathlib.Path:
    return max((root / "usr" / "bin").glob("python3.*[0-9]"))
