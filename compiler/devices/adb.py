"""Android devices over adb: ``adb:[SERIAL][/path/to/python]``.

Through ``adb shell``, which carries bytes unchanged from Android 7 on. Android brings no
Python, and an app's files are closed to the shell: the path names a Python that the shell may
start, for example a script in /data/local/tmp with ``exec run-as com.termux
files/usr/bin/python "$@"``. (Termux's own sshd behind ``adb forward`` is reached by ssh://.)
"""

from __future__ import annotations

import re
import shlex

from edgec.devices.job import last_line
from edgec.devices.remote import BOOTSTRAP, RemotePython
from edgec.errors import DeviceError

_ADDRESS = re.compile(r"adb:(?P<serial>[\w][\w.:-]*)?(?P<python>/.*)?")
_ADVICE = {
    "unauthorized": "allow debugging by this computer on the device's screen",
    "offline": "connect it again, or run: adb kill-server",
    "more than one": "name one of those that `adb devices` lists, as adb:SERIAL",
    "no devices": "connect one and allow USB debugging; `adb devices` has to list it",
    "not found": "`adb devices` lists those that are there",
    "pty": "Android 7 or later is needed",
}


def open_adb(text: str) -> RemotePython:
    """The Android device with that serial number, or the only one, connected.

    Raises DeviceMissingError if there is no adb, DeviceError if the address is wrong, or the
    device unreachable or incomplete.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise DeviceError(f"device {text}: expected adb:[SERIAL][/path/to/python]")
    select = ["-s", match["serial"]] if match["serial"] else []
    python = shlex.quote(match["python"] or "python3")
    command = ["adb", *select, "shell", "-T", f"{python} {BOOTSTRAP}"]
    return RemotePython(text, command, _explain)


def _explain(said: str) -> str:
    lines = [line for line in said.splitlines() if line.startswith(("error:", "adb:"))]
    reason = last_line(lines[0] if lines else said)
    advice = [text for word, text in _ADVICE.items() if word in reason]
    return f"it cannot be reached: {reason}; {(advice or ['`adb shell true` has to work'])[0]}"
