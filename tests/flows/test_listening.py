"""Beside another server `make up` refuses, and says who is there and which port is free."""

import os
import socket
import subprocess
import sys

import prefect as package
import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from flows import listening, pool, services
from t5lib.utils.errors import T5Error


@pytest.mark.pipeline
@pytest.mark.xdist_group("prefect")
@pytest.mark.usefixtures("prefect")
def test_a_strangers_prefect_server_is_named_and_not_taken_over(tmp_path):
    port = int(PREFECT_API_URL.value().split(":")[2].split("/")[0])
    found = rf"port {port} is taken by a Prefect server \({package.__version__}\) that `make up` did not start"
    with pytest.raises(T5Error, match=rf"{found} here: process \d+ \(python.*left alone.* make up PORT=\d+$"):
        services.up(tmp_path, port)
    assert not (tmp_path / services.HOME).exists()
    with get_client(sync_client=True) as client:
        assert pool.NAME not in [each.name for each in client.read_work_pools()]
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert not listening.answers(psutil.Process(stranger.pid), port)
    stranger.communicate()


def test_another_program_at_the_port_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(listening, "PATIENCE", 0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(T5Error, match=rf"port {port} is taken by another program: process {os.getpid()} "):
            services.up(tmp_path, port)
