"""The temporary server that Prefect starts for a flow, if there is no other, ends with that flow."""

from functools import cache

from prefect.settings import get_current_settings

from flows.process import end_with_us


@cache
def end_temporary_server_with_us() -> None:
    """To be called before the flow begins; does nothing where there is a server already.

    Prefect stops the server that it starts for a flow only where the flow can still ask for it.
    """
    if get_current_settings().api.url is not None:
        return
    from prefect.server.api.server import SubprocessASGIServer  # seconds, which a flow with a server need not spend

    start = SubprocessASGIServer._run_uvicorn_command

    def watched(server):
        process = start(server)
        end_with_us(process.pid)
        return process

    SubprocessASGIServer._run_uvicorn_command = watched
