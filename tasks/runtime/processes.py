"""Which process a record is of, and whether that one is gone."""

import os
import socket


def identity() -> str:
    """This process for `is_gone`: host, process id and start time (s), which tells it from others with that id."""
    import psutil

    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def is_gone(identity: str) -> bool:
    """True when that process ran on this host and has ended; False also where this cannot be known."""
    import psutil

    try:
        host, pid, began = identity.split()
        if host != socket.gethostname():
            return False
        return abs(psutil.Process(int(pid)).create_time() - float(began)) > 1
    except ValueError:
        return False
    except psutil.NoSuchProcess:
        return True
