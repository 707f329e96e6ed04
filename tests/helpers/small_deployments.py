"""What the small repository's prefect.yaml says, and a free port for its server."""

import socket

DEPLOYMENTS = """
name: t5
pull: null
deployments:
  - name: convert-vit
    entrypoint: flows/t5.py:t5
    parameters: {target: small}
    work_pool: {name: local}
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
