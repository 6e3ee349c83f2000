"""Real devices over ssh, by an sshd of the test's own on this machine's loopback."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from devices import bundles

from edgec.devices.check import Samples, verify_on
from edgec.devices.connect import open_device
from edgec.devices.job import Job
from edgec.errors import DeviceError, DeviceMissingError
from edgec.machine import this_machine

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
PYTHON = sys.executable


@dataclass(frozen=True)
class Server:
    """An sshd. there: its TMPDIR, here: this side's; both empty before and after a job."""

    folder: pathlib.Path
    there: pathlib.Path
    here: pathlib.Path
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"ssh://board{PYTHON}"

    def sessions(self) -> list[int]:
        """Process ids of the sshd that serve connections."""
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        return [int(pid) for pid in found.stdout.split()]


@contextlib.contextmanager
def serving(folder: pathlib.Path, lines: str = "", **options: object) -> Iterator[Server]:
    """Run an sshd whose sessions have ``there`` as TMPDIR, and a client that knows it."""
    if not os.access(SSHD, os.X_OK) or shutil.which("ssh") is None:
        pytest.skip("there is no sshd or no ssh on this machine")
    if os.geteuid() == 0:
        pathlib.Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd shuts itself in
    there, here = folder / "there", folder / "here"
    there.mkdir(exist_ok=True), here.mkdir()
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(key, check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nPasswordAuthentication no\n"
        f"SetEnv TMPDIR={there}\n{lines}"
    )
    (folder / "config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {folder}/user\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known\n"
        f"  GlobalKnownHostsFile /dev/null\n"
    )
    public = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {public}")
    process = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")],
        stderr=(folder / "log").open("wb"),
        **options,  # type: ignore[call-overload]
    )
    try:
        until(lambda: b"listening" in (folder / "log").read_bytes())
        yield Server(folder, there, here, process)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return bundles.build(
        "arm64" if this_machine().arch == "arm64" else "x86-64", tmp_path_factory.mktemp("bundle")
    )


@pytest.fixture
def server(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(tmp_path) as running:
        use(running, monkeypatch)
        yield running


def use(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEC_SSH_COMMAND", f"ssh -F '{server.folder}/config'")
    monkeypatch.setattr(tempfile, "tempdir", str(server.here))


def until(happened: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def nothing_is_left(server: Server) -> None:
    """Wait for an end that the other side sees a little later; no file and no process stays."""
    until(lambda: not list(server.there.iterdir()))
    assert not list(server.here.iterdir())
    until(lambda: not guests(server))


def guests(server: Server) -> list[int]:
    """Process ids of the programs that run in the other side's folder."""
    listed = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True).stdout
    return [int(x.split()[0]) for x in listed.splitlines() if f" {server.there}/edgec-" in x]


def running(server: Server) -> list[int]:
    """Process ids of guests that have their job; the probe is not meant."""
    return guests(server) if list(server.there.glob("*/job.json")) else []


def endless(bundle: pathlib.Path) -> Job:
    """A job that does not end while a test runs."""
    return Job(bundle, bundles.samples(), repeats=10**9)


def test_a_bundle_passes_there_and_gives_what_it_gives_here(
    server: Server, bundle: pathlib.Path
) -> None:
    [verdict] = verify_on(bundle, [server.address], Samples(tuple(bundles.samples()), 3))
    assert verdict.status == "passed", verdict.reason
    assert verdict.judgement == verdict.here  # the same CPU
    assert verdict.outcome is not None and verdict.outcome.arch == this_machine().arch
    nothing_is_left(server)


@pytest.mark.slow
def test_one_connection_serves_several_jobs_and_repeats_are_timed(
    server: Server, bundle: pathlib.Path
) -> None:
    with open_device(server.address) as device:
        assert set(device.profile.features) == set(this_machine().features)
        first = device.run(Job(bundle, bundles.samples(), repeats=5))
        second = device.run(Job(bundle, bundles.samples(1)))
        assert len(server.sessions()) == 1
    assert len(first.latency_ms) == 5 and min(first.latency_ms) > 0
    assert len(first.outputs) == 3 and len(second.outputs) == 1
    np.testing.assert_array_equal(first.outputs[0]["y"], second.outputs[0]["y"])
    assert second.latency_ms == ()
    nothing_is_left(server)


@pytest.mark.parametrize("what", ["session", pytest.param("client", marks=pytest.mark.slow)])
def test_a_connection_that_is_lost_gives_one_error_and_leaves_nothing(
    what: str, server: Server, bundle: pathlib.Path
) -> None:
    with open_device(server.address) as device:

        def cut() -> None:
            until(lambda: running(server))
            process = device._connection._process  # type: ignore[attr-defined]
            lost = server.sessions() if what == "session" else [process.pid]
            for pid in lost:
                os.kill(pid, signal.SIGKILL)

        cutter = threading.Thread(target=cut)
        cutter.start()
        with pytest.raises(DeviceError, match="board.*the connection was lost"):
            device.run(endless(bundle))
        cutter.join()
    nothing_is_left(server)


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(server: Server, bundle: pathlib.Path) -> None:
    def interrupt() -> None:
        until(lambda: running(server))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), open_device(server.address) as device:
        threading.Thread(target=interrupt).start()
        device.run(endless(bundle))
    nothing_is_left(server)


def test_a_full_disk_there_gives_one_error_and_leaves_nothing(
    tmp_path: pathlib.Path, bundle: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(there)]
    if subprocess.run(mounted, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    large = tmp_path / "large.edgec"
    large.write_bytes(bundle.read_bytes() + bytes(8 << 20))
    feeds = bundles.samples(256)  # 1 MiB, outputs of 256 KiB
    try:
        with serving(tmp_path) as server:
            use(server, monkeypatch)
            with open_device(server.address) as device:
                with pytest.raises(DeviceError, match=r"model\.edgec .* written: No space left"):
                    device.run(Job(large, bundles.samples()))
                disk = os.statvfs(there)
                wanted = bundle.stat().st_size + (1 << 20) + (128 << 10)
                filler = there / "filler"
                filler.write_bytes(bytes(disk.f_bavail * disk.f_bsize - wanted))
                with pytest.raises(DeviceError, match="without an outcome: .*No space left"):
                    device.run(Job(bundle, feeds))
                filler.unlink()
                assert len(device.run(Job(bundle, feeds)).outputs) == 256
            nothing_is_left(server)
    finally:
        subprocess.run(["umount", str(there)], check=True)


@pytest.mark.slow
def test_feeds_that_do_not_fit_there_give_one_error(
    tmp_path: pathlib.Path, bundle: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    limit = bundle.stat().st_size + 100_000  # of any one file
    feeds = bundles.samples(limit // (4 * 64 * 4) // 3)
    with serving(
        tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    ) as server:
        use(server, monkeypatch)
        with open_device(server.address) as device:
            assert len(device.run(Job(bundle, feeds[:2])).outputs) == 2
            with pytest.raises(DeviceError, match="feeds.tensors.*File too large"):
                device.run(Job(bundle, feeds))
        nothing_is_left(server)


def test_a_host_with_an_unknown_key_is_not_trusted(server: Server) -> None:
    (server.folder / "known").write_text("")
    with pytest.raises(DeviceError, match="cannot be reached: Host key verification failed"):
        open_device(server.address)
    nothing_is_left(server)


def test_a_user_without_a_key_is_not_asked_for_a_password(server: Server) -> None:
    (server.folder / "user.pub").write_text("")
    with pytest.raises(DeviceError, match=r"Permission denied.*`ssh board true` has to work"):
        open_device(server.address)


def test_a_server_that_is_not_there_is_told(server: Server) -> None:
    server.process.terminate()
    server.process.wait()
    with pytest.raises(DeviceError, match="board.*cannot be reached.*Connection refused"):
        open_device(server.address)


@pytest.mark.skipif(shutil.which("ssh") is None, reason="there is no ssh on this machine")
def test_the_command_to_try_has_the_user_and_the_port() -> None:
    wanted = "refused; `ssh -l pi -p 1 127.0.0.1 true` has to work without a question"
    with pytest.raises(DeviceError, match=wanted):
        open_device("ssh://pi@127.0.0.1:1")


def test_a_path_without_python_is_told(server: Server) -> None:
    with pytest.raises(DeviceError, match=r"there is no Python: .*(not found|No such file)"):
        open_device("ssh://board/opt/none/bin/python3")


@pytest.mark.slow
def test_a_python_without_packages_is_told_with_what_to_install(
    server: Server, tmp_path: pathlib.Path
) -> None:
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    with pytest.raises(DeviceError, match="has no numpy and no onnxruntime; .* pip install"):
        open_device(f"ssh://board{tmp_path}/bare/bin/python")
    nothing_is_left(server)


@pytest.mark.slow
def test_a_guest_that_dies_is_told(server: Server, bundle: pathlib.Path) -> None:
    def kill() -> None:
        until(lambda: running(server))
        for pid in running(server):
            os.kill(pid, signal.SIGSEGV)

    with open_device(server.address) as device:
        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(DeviceError, match="died of SIGSEGV"):
            device.run(endless(bundle))
        killer.join()
        assert device.run(Job(bundle, bundles.samples())).outputs  # the connection lives on
    nothing_is_left(server)


@pytest.mark.slow
def test_a_device_without_a_writable_folder_is_told(server: Server) -> None:
    wrapper = server.folder / "python"
    start = "import tempfile; tempfile.tempdir = '/nowhere'"
    wrapper.write_text(f'#!/bin/sh\nexec {PYTHON} -c "{start}\n$2"\n')
    wrapper.chmod(0o755)
    with pytest.raises(DeviceError, match="on the device: no temporary folder can be made"):
        open_device(f"ssh://board{wrapper}")


@pytest.mark.slow
def test_a_path_may_begin_at_the_home_folder(server: Server, bundle: pathlib.Path) -> None:
    home = pathlib.Path("~").expanduser()
    with open_device(f"ssh://board/~/{os.path.relpath(PYTHON, home)}") as device:
        assert device.run(Job(bundle, bundles.samples())).outputs


@pytest.mark.slow
def test_what_a_login_shell_prints_does_not_disturb(server: Server, bundle: pathlib.Path) -> None:
    wrapper = server.folder / "python"
    wrapper.write_text(f'#!/bin/sh\necho "Welcome to this board"\nexec {PYTHON} "$@"\n')
    wrapper.chmod(0o755)
    with open_device(f"ssh://board{wrapper}") as device:
        assert device.run(Job(bundle, bundles.samples())).outputs


@pytest.mark.parametrize(
    "address", ["ssh://", "ssh://-oProxyCommand=x", "ssh://a b", "ssh://host:port", "ssh://@host"]
)
def test_an_address_that_is_none_is_told(address: str) -> None:
    with pytest.raises(DeviceError, match=r"expected ssh://\[user@\]host"):
        open_device(address)


def test_a_machine_without_ssh_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEC_SSH_COMMAND", "/nowhere/ssh")
    with pytest.raises(DeviceMissingError, match="there is no /nowhere/ssh on this machine"):
        open_device("ssh://board")
