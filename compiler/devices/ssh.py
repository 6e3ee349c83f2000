"""Real devices over ssh: ``ssh://[user@]host[:port][/path/to/python]``.

By the ssh client of this machine as its user has set it up: names of hosts, keys, jump hosts
and known hosts come from ~/.ssh/config. Another configuration is given as git's users do:
EDGEC_SSH_COMMAND="ssh -F FILE". No question is answered and no host key accepted here.
"""

from __future__ import annotations

import os
import re
import shlex

from edgec.devices.job import last_line
from edgec.devices.remote import BOOTSTRAP, RemotePython
from edgec.errors import DeviceError

_ADDRESS = re.compile(
    r"ssh://(?:(?P<user>\w[\w.-]*)@)?(?P<host>\w[\w.-]*|\[[0-9a-fA-F:.%]+\])(?::(?P<port>\d+))?"
    r"(?P<python>/.*)?"
)
# no answer within 20 s: unreachable; silence for a minute: lost
_OPTIONS = (
    "-T",
    "-oBatchMode=yes",
    "-oConnectTimeout=20",
    "-oServerAliveInterval=15",
    "-oServerAliveCountMax=4",
)


def open_ssh(text: str) -> RemotePython:
    """The device at an address, connected.

    text: ``ssh://[user@]host[:port]``, and behind it the path of the Python to use there;
    ``/~/`` is the home folder: ``ssh://pi@board/~/venv/bin/python``. By default python3.
    Raises DeviceError if the address is wrong, or the device unreachable or incomplete.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise DeviceError(
            f"device {text}: expected ssh://[user@]host[:port][/path/to/python], for example "
            "ssh://pi@board.local/~/venv/bin/python"
        )
    client = shlex.split(os.environ.get("EDGEC_SSH_COMMAND") or "ssh")
    to = ["-l", match["user"]] if match["user"] else []
    to += ["-p", match["port"]] if match["port"] else []
    host = match["host"].strip("[]")
    python = (match["python"] or "python3").removeprefix("/~/")
    command = [*client, *_OPTIONS, *to, "--", host, f"{shlex.quote(python)} {BOOTSTRAP}"]

    def explain(said: str) -> str:
        reason = f"it cannot be reached: {last_line(said)}"
        return f"{reason}; `{' '.join(['ssh', *to, host])} true` has to work without a question"

    return RemotePython(text, command, explain)
