"""From settings to a running server."""

import asyncio
import contextlib
import errno
import importlib.util
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_adapters.config.data import TemplateConfig
from mlx_adapters.config.mapping import require
from mlx_adapters.config.quantization import CacheQuantization
from mlx_adapters.config.sampling import Drafting
from mlx_adapters.errors import ConfigError, NotFoundError
from mlx_adapters.generation.live import load_model
from mlx_adapters.models.layers import check_fits, check_made_for
from mlx_adapters.serving.engine import Engine
from mlx_adapters.serving.jobs import OncePerSecond, log
from mlx_adapters.serving.residents import Served
from mlx_adapters.serving.settings import ServeSettings, check_names
from mlx_adapters.sources.lookup import reference_of
from mlx_adapters.sources.references import check_name
from mlx_adapters.system.interrupt import handling

OTHER_FILES = 200  # that are open beside connections: shards of a base, adapters that are read, libraries


def parse_adapter(text: str) -> tuple[str, str]:
    """(name, reference) of "NAME=REF" or of a registry reference, which is its own name."""
    name, equals, reference = text.partition("=")
    if not equals:
        require(reference_of(text).kind == "name", f"'{text}' needs a name.", f"write NAME={text}.")
        name, reference = text.partition("@")[0], text
    reference_of(reference)
    return check_name(name), reference


def read_keys(path: Path) -> tuple[str, ...]:
    """The API keys in a file, one a line; '#' begins a comment."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except FileNotFoundError:
        raise NotFoundError(f"There is no key file '{path}'.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The key file '{path}' cannot be read: {error}.") from None
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    require(len(keys) > 0, f"The key file '{path}' holds no key.")
    require(all(len(key) >= 16 for key in keys), f"A key in '{path}' is shorter than 16 characters.")
    require(all(key.isascii() for key in keys), f"A key in '{path}' is not ASCII, which HTTP cannot carry safely.")
    return keys


def make_engine(
    base: str,
    adapters: Sequence[tuple[str, str]],
    settings: ServeSettings,
    *,
    dtype: str = "auto",
    name: str | None = None,
    template: TemplateConfig | None = None,
    kv: CacheQuantization | None = None,
    drafting: Drafting | None = None,
) -> Engine:
    """Load the base, check every adapter against it and keep the first ones in memory.

    `base` may be a fused model. It is served as `name`, else as it is called, a folder by its last part. What
    `template` leaves open is as each adapter was trained. Raises AdapterError before anything listens.
    """
    called = name or (Path(base).name if Path(base).is_dir() else base)
    check_names(called, [adapter for adapter, _ in adapters], settings.splits)
    os.environ.setdefault("MLX_CUDA_GRAPH_CACHE_SIZE", "2000")  # each size of a batch and each prompt launches its own
    model = load_model(base, dtype=dtype, template=template, kv=kv, drafting=drafting)
    engine = Engine(model, settings, called)
    for adapter, reference in adapters:
        served = Served(adapter, reference)
        loaded = served.read()
        if len(model.pool.attached) < settings.max_adapters:
            engine.residents.attach(served, loaded)
        else:
            check_fits(loaded, model.module, f"'{called}'")
            check_made_for(loaded, model.base.name, model.base.fingerprint)
        engine.catalog.served[adapter] = served
    return engine


def run_server(
    engine: Engine,
    on_start: Callable[[str, Callable[[], None]], None],
    listener: socket.socket | None = None,
    on_second_interrupt: Callable[[], None] = lambda: None,
    on_leaving: Callable[[float], None] = lambda seconds: None,
) -> None:
    """Listen until a signal of `interrupt.STOPS` comes, then finish what is under way.

    One that comes before `drain_seconds` are over ends them. `on_second_interrupt` is called, in the signal's
    handler, by one that comes when nothing more is accepted. `on_leaving` hears for how many seconds it still answers,
    and with 0 that only what is under way is finished, where there is anything. `on_start` gets
    the address and a function that ends the server, when it listens: a signal is heard from then on, also in
    `on_start` itself. `listener`: what `bind` gave, where
    an address that is taken must be known before the model is loaded.

    Raises ConfigError if the extra `serve` is missing or the address is taken.
    """
    check_extra()
    import uvicorn

    from mlx_adapters.serving.app import Server

    settings = engine.settings
    listener = listener or bind(settings.host, settings.port)
    site, once = Server(engine), OncePerSecond()
    app = site.app()
    for name in ("uvicorn.error", "asyncio", log.name):
        logging.getLogger(name).addFilter(once)
    config: Any = uvicorn.Config(
        app,
        http=connections(settings),
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_keep_alive=int(settings.header_seconds) or 1,
        timeout_graceful_shutdown=30,
        server_header=False,
        h11_max_incomplete_event_size=64 << 10,
    )
    host, port = listener.getsockname()[:2]

    class Listening(uvicorn.Server):
        drained: float | None = None  # when it ends, if it answers on until then

        def capture_signals(self) -> Any:
            return contextlib.nullcontext()  # they are ours, from before anybody was told that we listen

        def interrupt(self, *_: Any) -> None:
            if self.should_exit:
                on_second_interrupt()
            self.should_exit = site.leaving or not settings.drain_seconds
            site.leaving = True

        async def on_tick(self, counter: int) -> bool:
            if site.leaving and self.drained is None:
                self.drained = time.monotonic() + settings.drain_seconds
                if not self.should_exit:
                    on_leaving(settings.drain_seconds)
            self.should_exit |= self.drained is not None and time.monotonic() > self.drained
            return await super().on_tick(counter)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            if engine.busy:
                on_leaving(0)
            await super().shutdown(sockets)

    server = Listening(config)
    with _address_errors(host, port):
        listener.listen(1024)  # not in `bind`: clients would wait for the model to be loaded
    address = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
    with handling(server.interrupt):
        on_start(address, lambda: setattr(server, "should_exit", True))
        server.run(sockets=[listener])
        app.log.close()


def check_extra() -> None:
    """Raise ConfigError unless what serving needs is installed."""
    missing = [name for name in ("starlette", "uvicorn", "llguidance") if importlib.util.find_spec(name) is None]
    require(not missing, f"Serving needs {' and '.join(missing)}.", 'pip install ".[serve]" (README, Extras).')


def connections(settings: ServeSettings) -> type:
    """uvicorn's HTTP over one connection, with deadlines and a limit.

    A connection is closed that says nothing in time, or whose reader takes nothing. Where there are too many at once,
    the one that has been silent longest gives way to the newest, so that silence keeps nobody out. They are fewer than
    the files that this process may open: else accepting fails for everybody.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = settings.max_connections
    if soft != resource.RLIM_INFINITY:
        most = min(most, max(soft - OTHER_FILES, soft // 2))

    silent: dict[Any, None] = {}  # connections that have not said what they want, the longest silent first

    class Connection(H11Protocol):
        speaking: asyncio.TimerHandle | None = None
        reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._await_request()
            if len(self.connections) > most:
                log.warning("more than %d connections: those that ask for nothing are closed", most)
                first = next(iter(silent))
                first._forget("speaking")
                first.transport.abort()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget("speaking")
            self._forget("reading")

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget("speaking")
            elif self.speaking is None:
                self._await_request()

        def send_400_response(self, msg: str) -> None:
            """End a connection whose request turns out to be no HTTP; who answers it already says nothing more."""
            answering = self.cycle
            if answering is None or not answering.response_started:
                super().send_400_response(msg)
            if answering is not None:
                answering.disconnected = True
                self.transport.close()

        def pause_writing(self) -> None:
            super().pause_writing()
            self.reading = self.reading or self.loop.call_later(settings.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._forget("reading")

        def _await_request(self) -> None:
            silent[self] = None
            self.speaking = self.loop.call_later(settings.header_seconds, self.transport.abort)

        def _forget(self, name: str) -> None:
            timer = getattr(self, name)
            if timer is not None:
                timer.cancel()
                setattr(self, name, None)
            if name == "speaking":
                silent.pop(self, None)

    return Connection


def bind(host: str, port: int) -> socket.socket:
    """Take the address. Raises ConfigError if it cannot be had, or if somebody else answers there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with _address_errors(host, port):
        if port and _answers(family, host, port):
            raise OSError(errno.EADDRINUSE, "another program answers there")
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        return listener


def _answers(family: socket.AddressFamily, host: str, port: int) -> bool:
    """Whether a program listens there. A Mac lets a second one bind 127.0.0.1 beside one that has all addresses."""
    with socket.socket(family) as probe:
        probe.settimeout(0.5)
        taken = probe.connect_ex(({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)) == 0
        return taken and probe.getsockname() != probe.getpeername()  # a free port may connect to itself


@contextlib.contextmanager
def _address_errors(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "this is no address"
        raise ConfigError(f"Cannot listen on {host}:{port}: {why}.", "choose another --port or --host.") from None
