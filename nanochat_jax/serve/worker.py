"""Engines under traffic: a thread owns each of them, requests reach it through an inbox.

  Pool.submit -> inbox of the least busy Worker -> engine.step -> pieces -> the request's Ticket
  (event loop)                                     (the worker's thread)     (event loop)

Invariants: only its thread touches an engine; all that is counted is counted on the event loop.
Every text gets a last piece, whose `finish` is not "", whatever happens to the engine; so what a
client was lent comes back even if nobody reads its answer.
"""

import asyncio
import queue
import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nanochat_jax.common import UserError
from nanochat_jax.inference.engine import Engine
from nanochat_jax.inference.request import Completion, Request

RETRY_SECS = 1  # when to ask again, as told to those who are sent away


class Refused(Exception):
    """The pool takes no request now: `why` is "busy", "draining" or "dead"."""

    def __init__(self, why: str, message: str):
        super().__init__(message)
        self.why = why


@dataclass(eq=False)
class Job:
    """One text of a ticket, and the worker that writes it."""

    request: Request
    ticket: "Ticket"
    index: int  # among the ticket's texts
    worker: "Worker"
    timed_out: bool = False


@dataclass(eq=False)
class Ticket:
    """The texts that one client asked for at once, and their pieces as they come."""

    client: str
    deadline: float  # of time.monotonic()
    jobs: list[Job] = field(default_factory=list)
    pieces: asyncio.Queue[tuple[int, Completion]] = field(default_factory=asyncio.Queue)

    async def next(self, timeout: float | None = None) -> tuple[int, Completion] | None:
        """The next piece and which text's it is; None after `timeout` seconds without one."""
        try:
            async with asyncio.timeout(timeout):
                return await self.pieces.get()
        except TimeoutError:
            return None

    def cancel(self, index: int | None = None) -> None:
        """End one text, or all. Those that have ended are left alone."""
        for job in self.jobs if index is None else [self.jobs[index]]:
            job.worker.inbox.put((job, False))


class Worker:
    """An engine and the thread that owns it."""

    def __init__(self, engine: Engine, number: int):
        self.engine = engine
        self.inbox: queue.SimpleQueue[tuple[Job, bool] | None] = queue.SimpleQueue()
        self.jobs: set[Job] = set()  # not ended; the event loop's
        self.error = ""  # why the thread is dead
        self.thread = threading.Thread(target=self._run, name=f"engine {number}", daemon=True)
        self._mine: dict[int, Job] = {}  # not ended, by the engine's id; the thread's

    def start(self, pool: "Pool", loop: asyncio.AbstractEventLoop) -> None:
        self._pool, self._loop = pool, loop
        self.thread.start()

    @property
    def tokens(self) -> int:
        """What it has to do: tokens of all prompts and answers that have not ended, at most."""
        all = (len(job.request.prompt) + job.request.max_new_tokens for job in self.jobs)
        return sum(min(tokens, self.engine.max_len) for tokens in all)

    def _run(self) -> None:
        try:
            while self._read_inbox():
                self._end_late_ones()
                self._tell([(self._mine[piece.id], piece) for piece in self.engine.step()])
        except Exception as error:  # told to all clients and by /health
            traceback.print_exc()
            self._to_loop(self._pool.bury, self, f"{type(error).__name__}: {error}")

    def _read_inbox(self) -> bool:
        """Do what was asked; sleep while there is nothing to do. False: stop."""
        while True:
            try:
                message = self.inbox.get(block=not self.engine.busy())
            except queue.Empty:
                return True
            if message is None:
                return False
            job, wanted = message
            if not wanted:
                for id in [id for id, mine in self._mine.items() if mine is job]:
                    self.engine.cancel(id)
                continue
            try:
                self._mine[self.engine.submit(job.request)] = job
            except UserError as error:
                self._tell([(job, Completion(finish="error", reason=str(error)))])

    def _end_late_ones(self) -> None:
        now = time.monotonic()
        for id, job in self._mine.items():
            if now > job.ticket.deadline and not job.timed_out:
                job.timed_out = True
                self.engine.cancel(id)

    def _tell(self, pieces: list[tuple[Job, Completion]]) -> None:
        for place, (job, piece) in enumerate(pieces):
            if piece.finish:
                self._mine.pop(piece.id, None)
            if job.timed_out and piece.finish == "cancelled":
                pieces[place] = job, replace(piece, finish="timeout")
        if pieces:
            self._to_loop(self._pool.deliver, pieces)

    def _to_loop(self, call, *args) -> None:
        self._loop.call_soon_threadsafe(call, *args)


class Pool:
    """Workers with one queue's worth of patience; all methods belong to the event loop.

    max_queue: texts that may wait beyond those in slots. per_client: texts of one client at once.
    timeout_secs: from asking to the end of the answer.
    """

    def __init__(
        self, engines: Sequence[Engine], *, max_queue: int, per_client: int, timeout_secs: float
    ):
        self.workers = [Worker(engine, number) for number, engine in enumerate(engines)]
        self.max_queue, self.per_client, self.timeout_secs = max_queue, per_client, timeout_secs
        self.clients: Counter[str] = Counter()  # texts that have not ended
        self.draining = False

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        for worker in self.workers:
            worker.start(self, loop)

    @property
    def slots(self) -> int:
        return sum(worker.engine.slots for worker in self.workers if not worker.error)

    @property
    def texts(self) -> int:
        """How many texts have not ended."""
        return sum(len(worker.jobs) for worker in self.workers)

    @property
    def most_texts(self) -> int:
        """Of one request: more would be refused at any time."""
        return min(self.per_client, self.slots + self.max_queue)

    def health(self) -> str:
        """The word "ok", or why no request is taken: "dead" or "draining"."""
        dead = all(worker.error for worker in self.workers)
        return "dead" if dead else "draining" if self.draining else "ok"

    def submit(self, requests: Sequence[Request], client: str) -> Ticket:
        """Hand the requests to workers, all or none: Refused."""
        if self.health() != "ok":
            why = {"dead": "the engine has failed", "draining": "the server is about to end"}
            raise Refused(self.health(), why[self.health()])
        if self.texts + len(requests) > self.slots + self.max_queue:
            raise Refused("busy", f"{self.texts} answers are being written or wait; ask again soon")
        if self.clients[client] + len(requests) > self.per_client:
            raise Refused(
                "busy",
                f"{self.clients[client]} answers for this client are being written or wait, at "
                f"most {self.per_client} may; ask again when one has ended",
            )
        ticket = Ticket(client, time.monotonic() + self.timeout_secs)
        self.clients[client] += len(requests)
        for index, request in enumerate(requests):
            alive = [worker for worker in self.workers if not worker.error]
            worker = min(alive, key=lambda worker: worker.tokens)
            job = Job(request, ticket, index, worker)
            ticket.jobs.append(job)
            worker.jobs.add(job)
            worker.inbox.put((job, True))
        return ticket

    def deliver(self, pieces: Sequence[tuple[Job, Completion]]) -> None:
        """What a worker's step brought."""
        for job, piece in pieces:
            if job not in job.worker.jobs:
                continue  # buried meanwhile
            if piece.finish:
                job.worker.jobs.remove(job)
                self.clients[job.ticket.client] -= 1
                if not self.clients[job.ticket.client]:
                    del self.clients[job.ticket.client]
            job.ticket.pieces.put_nowait((job.index, piece))

    def bury(self, worker: Worker, error: str) -> None:
        """A worker has died: its texts end."""
        worker.error = error
        end = Completion(finish="error", reason="the engine has stopped")
        self.deliver([(job, end) for job in worker.jobs])

    async def close(self) -> None:
        """End all threads; texts that are being written end with an error."""
        self.draining = True
        for worker in self.workers:
            worker.inbox.put(None)
        for worker in self.workers:
            if worker.thread.is_alive():
                await asyncio.to_thread(worker.thread.join)
            self.bury(worker, "closed")
