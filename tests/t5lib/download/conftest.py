"""The server of files that tests of fetching use."""

import pytest
from file_server import DATA, Server


@pytest.fixture
def server():
    server = Server()
    server.content["/data.bin"] = DATA
    yield server
    server.shutdown()
    server.server_close()
