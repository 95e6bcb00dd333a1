"""The app: reads the settings, puts store, model, worker and API together, and serves them.

    python app.py --model demo        then http://127.0.0.1:7860/docs

Every setting is an option, and MOONREEL_NAME in the environment. Test: pytest tests/test_app.py
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from jobs.api import host_router, router
from jobs.api_ask import ask_router
from jobs.api_docs import docs_router
from jobs.api_results import result_router
from jobs.auth import check_exposure
from jobs.doors import Doors, default_allowed_hosts
from jobs.gradio_import import no_stubs
from jobs.gradio_uploads import SWEEP_S, bounded, sweep
from jobs.guard import guard
from jobs.http import ERROR_HANDLERS, add_problem_schema
from jobs.journal import DataUnusable
from jobs.log import set_up_log
from jobs.memory import bound_arenas
from jobs.service import Service
from jobs.settings import Settings, listed, read_settings
from pipeline.errors import DescriberError, InvalidOption

ROUTERS = [router, result_router, ask_router, host_router, docs_router]
APP: dict[str, Any] = {
    "title": "Moonreel",
    "description": "Describes any video, frame by frame.",
    "exception_handlers": ERROR_HANDLERS,
    "docs_url": None,  # FastAPI's load scripts from another host: see jobs/api_docs.py
    "redoc_url": None,
    "redirect_slashes": False,  # a redirected upload would be sent twice
}
MAX_BODY_BYTES = 65_536  # of requests without a file
STUCK_S = 60  # for the other end to take anything of an answer
STOP_S = 3  # for open connections to end, while the jobs that run are put away
SIGNAL_S = 0.2  # between two looks whether a signal has come
# The model's threads wait for one another awake for up to 0.2 ms: from one operation to the next, as to be woken costs
# a fifth of a CPU's frames, but no longer, which would keep decoders, pictures and requests from the cores.
SPIN_COUNT = "5000"
SWITCH_S = 0.0005  # a request need not wait for 5 ms, ten times over, behind the threads that list or load
MAX_OPEN_FILES, MAX_REQUESTS = 16_384, 2000  # files stay for the jobs
EXIT_BAD_SETTINGS = 2
RESULTS = Path(__file__).parent / "benchmark" / "results"  # which devices take how many instances and slots best
SPACE_PROXIES = "10.0.0.0/8"  # where a Space's requests come from; with *, visitors could claim any address

logger = logging.getLogger("moonreel")


def make_app(service: Service, settings: Settings) -> FastAPI:
    """The API alone, without the page. The app starts and stops the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.stop)

    app = FastAPI(lifespan=lifespan, **APP)
    app.root_path = settings.root_path  # as Gradio sets it on its own app
    add_routes(app, service)
    app.add_middleware(Doors, **doors(settings))
    return app


def add_routes(app: FastAPI, service: Service) -> None:
    app.state.api = service.api
    for routes in ROUTERS:
        app.include_router(routes)
    add_problem_schema(app)


def doors(settings: Settings) -> dict[str, Any]:
    """What Doors is given."""
    return {
        "allowed_hosts": default_allowed_hosts(settings.host, listed(settings.allowed_hosts)),
        "cors_origins": listed(settings.cors_origins),
        "max_requests": MAX_REQUESTS,
        "embed_origins": listed(settings.embed_origins),
        "max_body_bytes": MAX_BODY_BYTES,
        "max_upload_bytes": settings.max_video_bytes,
        "upload_paths": {"/api/upload", "/gradio_api/upload"},
    }


def main(arguments: list[str] | None = None) -> int:
    os.umask(0o077)  # videos and answers are for the server's user alone
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
        set_up_log(settings.log_format)
        check_exposure(settings.host, bool(settings.api_keys or settings.admin_keys), settings.allow_anonymous)
        port = usable_port(settings.host, settings.port)
        service = Service(settings, results=RESULTS)
    except (DescriberError, DataUnusable) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_SETTINGS
    sys.setswitchinterval(SWITCH_S)
    bound_arenas()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # what torch has on Linux spins so long in spite of it
    if os.environ.get("SYSTEM") == "spaces":
        os.environ.setdefault("FORWARDED_ALLOW_IPS", SPACE_PROXIES)  # else all visitors would count as one
    allow_open_files()
    (serve_page if settings.page else serve_api)(service, settings, port)
    return 0


def serve_page(service: Service, settings: Settings, port: int) -> None:
    """Serve page and API on Gradio's server, until a signal comes."""
    uploads = settings.data_dir.resolve() / "gradio"
    sweep(uploads, 0)  # what a server that was killed had received
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported, as is the other
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # on the disk whose room is looked after
    with no_stubs():
        from jobs.ui import LAUNCH, build, set_capacity  # takes seconds: not for --help and for wrong settings

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        add_routes(app, service)
        assert app.middleware_stack
        inner = bounded(app.middleware_stack, service.api)
        app.middleware_stack = Doors(guard(inner, service.gate), **doors(settings))
        service.start()
        sweeping = asyncio.create_task(sweep_on(uploads))
        yield
        sweeping.cancel()
        await asyncio.to_thread(service.stop)

    signals = listen_to_signals()
    blocks = build(service.api)
    service.on_pool = lambda pool: set_capacity(blocks, pool.num_slots)
    blocks.launch(
        server_name=settings.host,
        server_port=port,
        max_file_size=settings.max_video_bytes,
        root_path=settings.root_path or None,
        app_kwargs={"lifespan": lifespan, **APP},
        **LAUNCH,
    )
    let_go_of_stuck(blocks.server)
    logger.info("The page is at %s", blocks.local_url)
    wait_for(signals)
    service.begin_stop()
    blocks.close(verbose=False)
    service.stop()  # Gradio waits for its server for 5 s only


def listen_to_signals() -> list[int]:
    """-> what came, from now on: SIGTERM or SIGINT. A second one ends the process at once."""
    signals: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if signals:
            os._exit(128 + number)  # as a shell tells what ended of a signal
        signals.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return signals


def wait_for(signals: list[int]) -> None:
    """Return when one has come. Python handles it in the main thread alone, and the system may hand it to another
    thread, which does not wake this one: so it wakes by itself."""
    while not signals:
        time.sleep(SIGNAL_S)


async def sweep_on(uploads: Path) -> None:
    """Delete uploads that nobody has submitted, until canceled."""
    while True:
        await asyncio.sleep(SWEEP_S)
        await asyncio.to_thread(sweep, uploads)


def serve_api(service: Service, settings: Settings, port: int) -> None:
    config = uvicorn.Config(
        make_app(service, settings),
        host=settings.host,
        port=port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=STOP_S,
    )
    Server(config, service).run()


def usable_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises InvalidOption if it cannot be listened on."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
            return listening.getsockname()[1]
    except OSError as error:
        raise InvalidOption(
            f"Port {port} of {host} cannot be used: {error.strerror}. Stop what uses it, or choose another with --port."
        ) from error


class Server(uvicorn.Server):
    """uvicorn's server, which waits for open connections before it ends the app: so the service learns first that it
    stops, and event streams end. A first signal is an ordinary end, with exit code 0; a second one ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(128 + sig)  # as a shell tells what ended of a signal
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        let_go_of_stuck(self)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self._service.begin_stop)
        await super().shutdown(sockets)


def let_go_of_stuck(server: uvicorn.Server) -> None:
    """Have the system end connections whose other end takes nothing for STUCK_S: each holds one of MAX_REQUESTS, and
    uvicorn would wait for ever. Players and followers ask again for the rest. Only Linux has this."""
    option = getattr(socket, "TCP_USER_TIMEOUT", None)
    if option is not None:
        for listening in (each for one in server.servers for each in one.sockets):
            listening.setsockopt(socket.IPPROTO_TCP, option, STUCK_S * 1000)  # what it accepts inherits it


def allow_open_files() -> None:
    """Let connections and files of jobs not share the thousand that systems give a process by custom."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # a thread that downloads the model would hold up the end for as long as that takes
