"""The Prefect server, worker and deployments in the background, and MLflow's pages (`make up`, `make down`, `make ui`);
or a worker that runs single stages for flows on other machines.

    python -m flows.services up --port 4300
    python -m flows.services down
    python -m flows.services work --pool gpu

Process ids and logs are in data/prefect. `up` may be repeated: it leaves alone what runs already, and what it did not
make, such as another server or a work pool of another kind.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from httpx import HTTPError

from flows import listening, pool
from flows.process import environment, interrupt_on_signals, stream
from t5lib.utils import command_line
from t5lib.utils.errors import T5Error, without_secrets
from t5lib.utils.files import write_text
from tasks.runtime import tracking

HOME = Path("data/prefect")
PROFILE = '# written by `make up`, removed by `make down`\nactive = "t5"\n\n[profiles.t5]\nPREFECT_API_URL = "{url}"\n'

HOW_TO_TRIGGER = """\
Prefect is up: http://127.0.0.1:{port}   (logs: {home}, stop: make down)
Start a run:   .venv/bin/prefect deployment run t5/convert-vit --watch
Another one:   .venv/bin/prefect deployment run t5/convert-vit --watch --param target=deit-tiny
Its log:       .venv/bin/prefect flow-run logs UUID   (--watch shows it as it comes; ERROR says why a run failed)
What it made:  .venv/bin/prefect artifact ls
Runs at once:  one, the others wait; .venv/bin/prefect work-pool set-concurrency-limit local 2 allows two"""


def up(root: Path, port: int, *, patience: float = 120.0) -> None:
    """Start server, pool, worker and deployments, and wait until they can be used. What was begun ends if that fails.

    Raises:
        T5Error: the port or the pool is somebody else's, the server did not start (its last log lines are in the
            message), or a deployment is refused.
    """
    before = {name for name in ("server", "worker") if _running(root / HOME, name)}
    try:
        _up(root, port, patience)
    except BaseException:
        for name in ("worker", "server"):
            if name not in before:
                _end(root, name)
        if "server" not in before:
            (root / HOME / "profiles.toml").unlink(missing_ok=True)
        raise


def _up(root: Path, port: int, patience: float) -> None:
    home, url = root / HOME, f"http://{listening.HOST}:{port}/api"
    if server := _running(home, "server"):
        if not listening.answers(server, port):
            raise T5Error(
                f"the server that `make up` started does not answer at {url}; run `make down`, then `make up`"
            )
    else:
        listening.must_be_free(port, "make up PORT={}")
    _start(root, "server", ["server", "start", "--host", listening.HOST, "--port", str(port)], url)
    _wait_until_healthy(home, port, patience)
    write_text(home / "profiles.toml", PROFILE.format(url=url))
    if not _running(home, "worker"):
        pool.ready(url)
    _prefect(root, url, "deploy", "--all")
    _start(root, "worker", ["worker", "start", "--pool", pool.NAME, "--type", pool.TYPE], url)


def down(root: Path) -> None:
    """Stop the worker, then the server; flow runs started without them are not touched."""
    for name in ("worker", "server"):
        _end(root, name)
    (root / HOME / "profiles.toml").unlink(missing_ok=True)


def _start(root: Path, name: str, arguments: list[str], url: str) -> None:
    home = root / HOME
    if _running(home, name):
        return
    home.mkdir(parents=True, exist_ok=True)
    with (home / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=root,
            env=_environment(root, url),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # it outlives this terminal
        )
    write_text(home / f"t5-{name}.pid", f"{process.pid}\n")


def _environment(root: Path, url: str) -> dict[str, str]:
    """Ours alone is spoken to, and its record is here, whatever server or database the caller's variables name."""
    home = (root / HOME).resolve()  # the worker starts flows from another folder
    theirs = ("PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")
    ours = environment({"PREFECT_HOME": str(home), "PREFECT_API_URL": url})
    return {name: value for name, value in ours.items() if not name.startswith(theirs)}


def _end(root: Path, name: str) -> None:
    process = _running(root / HOME, name)
    if process is not None:
        _stop(process)
    (root / HOME / f"t5-{name}.pid").unlink(missing_ok=True)


def _running(home: Path, name: str) -> psutil.Process | None:
    """The process whose id is in the pid file, if it is still that one and not a stranger with the same id."""
    try:
        process = psutil.Process(int((home / f"t5-{name}.pid").read_text()))
        alive = process.status() != psutil.STATUS_ZOMBIE and {"prefect", name} <= set(process.cmdline())
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None
    return process if alive else None


def _stop(process: psutil.Process, *, patience: float = 30.0) -> None:
    everyone = [process, *process.children(recursive=True)]
    process.terminate()
    _, left = psutil.wait_procs(everyone, timeout=patience)
    for straggler in left:
        straggler.kill()
    psutil.wait_procs(left, timeout=5)


def _wait_until_healthy(home: Path, port: int, patience: float) -> None:
    until = time.monotonic() + patience
    while server := _running(home, "server"):
        if listening.answers(server, port):
            return
        if time.monotonic() > until:
            break
        time.sleep(0.5)
    lines = (home / "server.log").read_text(errors="replace").strip().splitlines()[-8:]
    told = f"the Prefect server did not come up on port {port}; {home / 'server.log'} ends with:"
    raise T5Error("\n".join([told, *lines]))


def _prefect(root: Path, url: str, *arguments: str) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
    run = subprocess.run(command, cwd=root, env=_environment(root, url), capture_output=True, text=True)
    if run.returncode:
        raise T5Error(f"`prefect {' '.join(arguments)}` failed:\n{run.stdout}{run.stderr}".rstrip())


def ui(root: Path, port: int) -> None:
    """Serve MLflow's pages until interrupted.

    Raises:
        T5Error: nothing was recorded yet, runs go elsewhere, or the port is taken.
    """
    if server := os.environ.get("MLFLOW_TRACKING_URI"):
        raise T5Error(f"MLFLOW_TRACKING_URI is set, so runs are recorded there; open {without_secrets(server)}")
    store = root / tracking.FOLDER / "mlflow.db"
    if not store.is_file():
        raise T5Error(f"{store} does not exist: no run was recorded yet; `make demo` makes one")
    listening.must_be_free(port, "make ui UI_PORT={}")
    print(f"MLflow: http://{listening.HOST}:{port}   (Ctrl-C ends it)", flush=True)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking.store_uri(root)]
    place = ["--host", listening.HOST, "--port", str(port), "--workers", "1"]
    # without this variable its job runners outlive it
    env = environment({"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})
    code = stream([*command, *place], print, cwd=root, env=env)
    if code:
        raise T5Error(f"MLflow's server ended with status {code}")


def work(root: Path, name: str) -> None:
    """Run the stages that wait in the work pool `name`, in this folder, until interrupted.

    Raises:
        T5Error: no server is named, it cannot be reached, or its pool of that name is of another kind.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise T5Error(
            "PREFECT_API_URL is not set; set it to the address of the Prefect server, such as http://server:4200/api"
        )
    try:
        pool.ready(url, name)
    except HTTPError as error:
        raise T5Error(
            f"the Prefect server at {without_secrets(url)} cannot be reached ({error}); is it running?"
        ) from None
    _prefect(root, url, "deploy", "flows/stage.py:stage", "--name", name, "--pool", name)
    print(f"work pool {name}: stages run in {root.resolve()}   (Ctrl-C ends it)", flush=True)
    worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", name, "--type", pool.TYPE]
    if code := stream(worker, print, cwd=root, env=_environment(root, url)):
        raise T5Error(f"Prefect's worker ended with status {code}")


def main() -> None:
    parser = command_line.parser("flows.services", str(__doc__))
    parser.add_argument(
        "action",
        choices=["up", "down", "ui", "work"],
        help="start all, stop all, show MLflow's pages, or run stages for flows on other machines",
    )
    parser.add_argument(
        "--port", type=int, help="port of the server or of the pages (default: 4200 for up, 5000 for ui)"
    )
    parser.add_argument("--pool", help="for `work`: the work pool whose stages run here (default: the machine's name)")
    arguments = parser.parse_args()
    interrupt_on_signals()
    try:
        if arguments.action == "up":
            port = arguments.port or 4200
            up(Path.cwd(), port)
            print(HOW_TO_TRIGGER.format(port=port, home=HOME))
            if elsewhere := os.environ.get("PREFECT_API_URL"):
                print(
                    f"PREFECT_API_URL names {without_secrets(elsewhere)}: run `unset PREFECT_API_URL` to use this one"
                )
        elif arguments.action == "down":
            down(Path.cwd())
        elif arguments.action == "work":
            work(Path.cwd(), arguments.pool or socket.gethostname())
        else:
            ui(Path.cwd(), arguments.port or 5000)
    except T5Error as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
