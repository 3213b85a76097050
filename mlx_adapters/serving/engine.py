"""The one thread that runs the model: takes jobs, batches them, hands out text.

The web side puts a `Job` in and reads its events from an asyncio queue; nothing else is shared. A job that is
canceled, too slow or failed leaves the batch between two steps. What a step wrote is handed out while MLX gives the
next one to the device: then Python's lock is free, and the web side keeps no step waiting.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from mlx_adapters.errors import AdapterError, ModelError
from mlx_adapters.generation.batching import Batcher
from mlx_adapters.generation.live import LiveModel
from mlx_adapters.generation.requests import Token
from mlx_adapters.models.adapter import Adapter
from mlx_adapters.protocols.errors import ApiError, public, told_as
from mlx_adapters.runtime.attached import Attached
from mlx_adapters.serving.jobs import Commands, Job, Piece, log, send_all
from mlx_adapters.serving.metrics import Metrics
from mlx_adapters.serving.residents import Catalog, Residents, Served
from mlx_adapters.serving.settings import ServeSettings
from mlx_adapters.system.door import mx
from mlx_adapters.system.machine import usable_memory_bytes

OVERTAKING_SECONDS = 1.0  # for which others may overtake a job whose adapter finds no room
READ_SECONDS = 5.0  # that the end waits for an adapter's files
CACHE_SHARE = 10  # of the memory, one part for prompts that were read
NO_ROOM = "All adapters are in use; none can make room."


class Engine:
    """Runs `model` for many jobs. `start` and `stop` it; any thread may call the others, any loop await them.

    Before it is started, adapters can be put into `residents`; later these are its thread's alone.
    """

    def __init__(self, model: LiveModel, settings: ServeSettings, base_name: str) -> None:
        self.model, self.settings = model, settings
        self.catalog = Catalog(base_name, model.base.template, settings.splits)
        self.metrics = Metrics()
        self.failed: BaseException | None = None
        self._commands = Commands()
        if (kept := settings.prompt_cache_bytes) is None:
            kept = usable_memory_bytes() // CACHE_SHARE
        self._batcher = Batcher(
            model.module, model.pool, settings.max_batch, cache_bytes=kept, make=model.new_layers, drafter=model.drafter
        )
        self._jobs: dict[int, Job] = {}
        self._parked: list[Job] = []
        self._open: set[Job] = set()
        self.residents = Residents(
            model, settings, self.metrics, lambda: self._commands.put(lambda: None), self._batcher.reader.known.drop
        )
        self._batcher.before_waiting = self._tell
        self._untold: list[tuple[Job, Piece | ApiError]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- from outside ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, seconds: float = 30.0) -> None:
        """Finish what is under way, for at most `seconds`, drop the rest, then end."""
        self._stopping.set()
        for work, patience in ((lambda: None, seconds), (partial(self._drop_all, self._open), 10)):
            self._commands.put(work)
            if self._thread.is_alive():  # a thread that computes while Python ends would bring the process down
                self._thread.join(patience)
        self.residents.close(READ_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether the engine works."""
        return self._thread.is_alive() and self.failed is None

    @property
    def busy(self) -> bool:
        """Whether anybody waits for an answer."""
        return bool(self._open or self._commands.asked)

    @property
    def in_turn(self) -> bool:
        """Whether requests are decoded one after another although more were allowed."""
        return self.settings.max_batch > 1 and not self._batcher.can_batch

    def submit(self, *jobs: Job) -> None:
        """Take jobs in, all or none. Raises ApiError 429 when too many wait, 503 when the server is stopping."""
        if len(self._open) + len(jobs) > self.settings.max_queue + self.settings.max_batch:
            if len(jobs) > self.settings.max_queue + self.settings.max_batch:
                raise ApiError(400, f"This server takes no {len(jobs)} answers at once.", param="n")
            raise ApiError(429, "Too many requests are waiting.", kind="rate_limit_error", code="queue_full")
        self._open.update(jobs)  # before the look at the engine, which tells all open jobs when it fails
        if self._stopping.is_set() or not self.alive:
            self._open.difference_update(jobs)
            raise ApiError(503, "The server is stopping.", kind="server_error")
        self._commands.put(lambda: self._parked.extend(jobs))

    def cancel(self, *jobs: Job) -> None:
        """Forget jobs; their places in the batch are free before the next step."""
        self._commands.put(partial(self._drop_all, jobs))

    async def embed(self, name: str, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """The mean hidden state of each prompt, with the adapter (or base) that `resolve` gave. Raises ApiError."""
        async with self._in_time():
            return [await self._embedding(name, ids) for ids in prompts]  # others may come between

    async def _embedding(self, name: str, ids: Sequence[int]) -> list[float]:
        while isinstance(vector := await self._ask(partial(self._embed, name, ids)), Future):
            with contextlib.suppress(Exception):  # who takes the adapter in tells what reading it raised
                await asyncio.shield(asyncio.wrap_future(vector))
        return vector

    def _embed(self, name: str, ids: Sequence[int]) -> list[float] | Future[Adapter]:
        attached = None
        if (served := self.catalog.adapter(name)) is not None and (attached := self._bring_in(served)) is None:
            if served.reading is not None:
                return served.reading
            raise ApiError(503, NO_ROOM, kind="server_error")
        with self.model.pool.routed([attached]):
            try:
                vector = self.model.embedding(list(ids))
            except ModelError as error:  # nothing of what was asked: that was looked at before
                raise ApiError(500, f"'{name}': {error.message}", kind="server_error") from None
        self.metrics.add("prompt_tokens_total", len(ids), model=name)
        return vector.tolist()

    async def add_adapter(self, name: str, reference: str) -> Served:
        """Serve another adapter and load it now.

        Raises AdapterError, or ApiError: 409 if the name is served, 503 if there is no room, 504 if it is not there in
        time; one that was just being taken in may then be served all the same.
        """
        served = Served(name, reference)
        self.catalog.require_new(name)
        async with self._in_time():
            await asyncio.shield(asyncio.wrap_future(self.residents.read(served)))
            return await self._ask(partial(self._add_adapter, served))

    def remove_adapter(self, name: str) -> None:
        """Serve an adapter no more. Answers that are being written with it are finished."""
        served = self.catalog.served.pop(name)
        self._commands.put(lambda: self.residents.leaving.append(served))

    def update_gauges(self) -> None:
        """Bring the gauges up to date."""
        pool = self.model.pool
        gauges = {
            "queue_length": len(self._batcher.reader.waiting) + len(self._batcher.reader.readings) + len(self._parked),
            "running": len(self._batcher.rows),
            "adapters_resident": len(pool.attached),
            "adapter_bytes": pool.nbytes,
            "prompt_cache_bytes": self._batcher.reader.known.nbytes,
            "memory_active_bytes": mx.get_active_memory(),
            "memory_peak_bytes": mx.get_peak_memory(),
        }
        for name, value in gauges.items():
            self.metrics.set(name, value)

    @contextlib.asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.settings.max_seconds) as clock:
                yield
        except TimeoutError:
            if not clock.expired():  # a network disk's
                raise
            raise self._late() from None

    def _late(self) -> ApiError:
        return ApiError(504, f"No answer within {self.settings.max_seconds:g} seconds.", kind="server_error")

    async def _ask(self, work: Callable[[], Any]) -> Any:
        """Run `work` in the engine's thread and give its result."""
        return await self._commands.ask(work, lambda: self.alive)

    # -- in the engine's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not (self._stopping.is_set() and not self._commands and self._batcher.idle and not self._parked):
                self._obey()
                self._step()
        except BaseException as error:
            self.failed = error
            log.exception("the engine stopped")
            self._tell()
            told = ApiError(500, "The engine stopped.", kind="server_error")
            for job in list(self._open):
                self._open.discard(job)  # else a full queue would tell what comes later to try again
                job.send(told)
            self._commands.fail(told)

    def _obey(self) -> None:
        """Carry out the commands that are there; wait for one if there is nothing else to do."""
        wait = self._batcher.idle and not self.residents.leaving
        self._commands.carry_out(wait, self._tell)  # a command may take its time
        if wait and self._parked:
            self._commands.await_company(self._open)

    def _step(self) -> None:
        now = time.monotonic()
        late = [j for j in [*self._jobs.values(), *self._parked] if now - j.arrived > self.settings.max_seconds]
        if late:
            self._tell()
        for job in late:
            self._drop(job, "timeout")
            job.send(self._late())
        waiting, self._parked = self._parked, []
        for job in waiting:
            blocked = any(
                now - other.arrived > OVERTAKING_SECONDS and not self._is_read(other) for other in self._parked
            )
            if blocked or not self._begin(job):
                self._parked.append(job)
        self.residents.let_go()
        if self._batcher.idle:
            return
        try:
            tokens = self._batcher.step()
        except Exception:
            log.exception("a step failed")
            self._tell()
            error = ApiError(500, "The model failed on this batch.", kind="server_error")
            for request in self._batcher.clear():
                self._fail(self._jobs.pop(request.number), error)
            return
        if self._batcher.rows:
            self.metrics.observe("batch_size", len(self._batcher.rows))
        told = [told for token in tokens if (told := self._told(token)) is not None]
        self._untold += told
        if self._batcher.idle:
            self._commands.ended(sum(job not in self._open for job, _ in told))
            self._tell()

    def _tell(self) -> None:
        """Hand out what was written."""
        told, self._untold = self._untold, []
        send_all(told)

    def _is_read(self, job: Job) -> bool:
        """Whether the job waits for its adapter's files."""
        served = self.catalog.served.get(job.model)
        return served is not None and served.reading is not None

    def _begin(self, job: Job) -> bool:
        """Give the job its adapter and queue it. False if it must wait: the adapter is read, or finds no room yet."""
        try:
            served = self.catalog.adapter(job.model)
            attached = None if served is None else self._bring_in(served)
            if served is not None and attached is None:
                return False
            with told_as():
                request = job.begin(attached, self.model.tokenizer)
        except ApiError as error:
            self._fail(job, error)
            return True
        except Exception:  # the other jobs go on
            log.exception("a request cannot be begun")
            self._fail(job, ApiError(500, "The server cannot begin with this request.", kind="server_error"))
            return True
        self._jobs[request.number] = job
        self._batcher.submit(request)
        self.metrics.add("prompt_tokens_total", len(job.prompt), model=job.model)
        return True

    def _bring_in(self, served: Served) -> Attached | None:
        """See `Residents.bring_in`. Raises ApiError 503 if it cannot be loaded."""
        try:
            return self.residents.bring_in(served)
        except Exception as error:  # a damaged file may raise what it likes
            log.warning("adapter '%s' cannot be loaded: %r", served.name, error)
            why = f": {public(error.message)}" if isinstance(error, AdapterError) else "."
            raise ApiError(503, f"Adapter '{served.name}' cannot be loaded{why}", kind="server_error") from None

    def _fail(self, job: Job, error: ApiError) -> None:
        self._end(job, "error")
        job.send(error)

    def _add_adapter(self, served: Served) -> Served:
        self.catalog.require_new(served.name)
        if self.residents.bring_in(served) is None:
            raise ApiError(503, NO_ROOM, kind="server_error")
        self.catalog.served[served.name] = served
        return served

    def _told(self, token: Token) -> tuple[Job, Piece | ApiError] | None:
        """Whom to tell what of a token."""
        if (job := self._jobs.get(token.request.number)) is None:  # one of several of a step, after a stop text
            return None
        if job.first is None and not token.of_prompt:
            job.begun(self.metrics)
        if (event := job.take(token)) is None:
            return None
        if isinstance(event, ApiError):
            self._drop(job, "error")
        elif event.finish_reason is not None:
            self._drop(job, "ok")  # counted before the client can know that it ended
        return job, event

    def _drop(self, job: Job, outcome: str) -> None:
        """Take a job out, wherever it stands; nothing if it is out already."""
        if job in self._parked:
            self._parked.remove(job)
        elif job.request is None or self._jobs.pop(job.request.number, None) is None:
            return
        else:
            self._batcher.cancel(job.request)
        self._end(job, outcome)

    def _drop_all(self, jobs: Iterable[Job]) -> None:
        for job in list(jobs):
            self._drop(job, "cancelled")

    def _end(self, job: Job, outcome: str) -> None:
        self._open.discard(job)
        job.count(self.metrics, outcome)
