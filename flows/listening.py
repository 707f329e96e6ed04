"""Who listens on a port of this machine: our server, another program, or nobody."""

import socket
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import suppress

import psutil

from t5lib.utils.errors import T5Error

HOST = "127.0.0.1"
PATIENCE = 2.0  # seconds for an answer


def must_be_free(port: int, command: str) -> None:
    """Raises T5Error that says who listens on `port`, and a port that is free as in `command`, "make up PORT={}"."""
    if not _connects(port):
        return
    raise T5Error(
        f"port {port} is taken by {_holder(port)}and is left alone. Take another port: {command.format(_free(port))}"
    )


def answers(server: psutil.Process, port: int) -> bool:
    """Whether a Prefect server answers on `port`, and is that process or its child: not a stranger."""
    try:
        family = [server, *server.children(recursive=True)]
    except psutil.Error:
        return False
    return _listens(family, port) and _version(port) is not None


def _connects(port: int) -> bool:
    with socket.socket() as caller:
        caller.settimeout(PATIENCE)
        return caller.connect_ex((HOST, port)) == 0


def _free(port: int) -> int:
    return next((other for other in range(port + 1, min(port + 100, 65536)) if not _connects(other)), port + 1)


def _holder(port: int) -> str:
    version = _version(port)
    what = f"a Prefect server ({version}) that `make up` did not start here" if version else "another program"
    for process in psutil.process_iter():
        if _listens([process], port):
            with suppress(psutil.Error):
                return f"{what}: process {process.pid} ({process.name()}), working in {process.cwd()}"
    return f"{what}, of another user"


def _listens(processes: Iterable[psutil.Process], port: int) -> bool:
    """Whether one of them does; False also where this user may not know."""
    for process in processes:
        with suppress(psutil.Error, OSError):
            if any(
                connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
                for connection in process.net_connections("tcp")
            ):
                return True
    return False


def _version(port: int) -> str | None:
    """Of the Prefect server that answers there; None for any other program."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/api/health", timeout=PATIENCE) as answer:
            healthy = answer.status == 200 and answer.read().strip() == b"true"
        with urllib.request.urlopen(f"http://{HOST}:{port}/api/admin/version", timeout=PATIENCE) as answer:
            return answer.read(100).decode(errors="replace").strip('"\n ') if healthy else None
    except urllib.error.HTTPError as error:
        return "which asks for a password" if error.code == 401 else None
    except (urllib.error.URLError, OSError, ValueError):
        return None
