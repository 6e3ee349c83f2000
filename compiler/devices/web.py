"""onnxruntime-web as a device: in Node.js, and in this machine's Chromium without a window.

The guest is JavaScript (``hosts/guest.mjs``) over the loader that a web page uses
(``hosts/edgec.mjs``). Chromium is driven by playwright-core and served from the loopback
address with the headers that threads need; nothing is fetched.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import tempfile
from collections.abc import Mapping

from edgec.devices.job import Device, Job, Outcome, read_outcome, write_job
from edgec.devices.local import clean_environment, execute
from edgec.errors import DeviceMissingError
from edgec.targets import Profile

HOSTS = pathlib.Path(__file__).parent / "hosts"
MODULES = "modules"  # folder of an environment: what npm installed
_PROVIDERS = {"CPUExecutionProvider": "wasm", "WebGpuExecutionProvider": "webgpu"}
_THREADS = "wasm_threads"  # the feature of a device whose runs are to use threads
_SWIFTSHADER = (  # Chromium's software GPU; it has no other here
    "--enable-unsafe-webgpu",
    "--use-webgpu-adapter=swiftshader",
    "--enable-features=Vulkan",
    "--use-vulkan=swiftshader",
    "--use-angle=swiftshader",
)


class WebDevice(Device):
    """Runs ``node PROGRAM FOLDER MODULES OPTIONS`` for every job.

    program: node.mjs, or chromium.mjs with the browser in options.
    """

    def __init__(
        self, profile: Profile, program: str, modules: pathlib.Path, options: Mapping[str, object]
    ) -> None:
        """Nothing is started yet."""
        self.profile = profile
        self._program = program
        self._modules = modules
        self._options = dict(options)

    def run(self, job: Job) -> Outcome:
        """Run a job. Raises DeviceError if the process fails."""
        threads = max(job.threads, 2) if _THREADS in self.profile.features else job.threads
        [provider, *_] = self.profile.providers
        options = {**self._options, "threads": threads, "provider": _PROVIDERS[provider]}
        with tempfile.TemporaryDirectory(prefix="edgec-") as name:
            folder = pathlib.Path(name)
            write_job(job, folder)
            command = ["node", str(HOSTS / self._program), str(folder), str(self._modules)]
            command.append(json.dumps(options))
            log = execute(command, clean_environment(), self.profile.name)
            return read_outcome(job, folder, self.profile, log)


def open_node(profile: Profile, folder: pathlib.Path) -> WebDevice:
    """WebAssembly in Node.js. folder: the environment, with modules/node_modules."""
    return WebDevice(profile, "node.mjs", folder / MODULES, {})


def open_chromium(profile: Profile, folder: pathlib.Path) -> WebDevice:
    """WebAssembly or WebGPU in Chromium. folder: as in ``open_node``.

    Raises DeviceMissingError if there is no Chromium on this machine.
    """
    browser = shutil.which("chromium")
    if browser is None:
        raise DeviceMissingError(f"device {profile.name}: there is no chromium on this machine")
    gpu = "WebGpuExecutionProvider" in profile.providers
    options = {"browser": browser, "flags": list(_SWIFTSHADER) if gpu else []}
    return WebDevice(profile, "chromium.mjs", folder / MODULES, options)
