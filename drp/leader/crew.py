"""Crew: brings workers to the point where they take drafts, at the start and again after a loss."""

from __future__ import annotations

from drp.leader.errors import WorkerError
from drp.leader.ground import Ground
from drp.leader.pool import Pool, WorkerProcess
from drp.protocol.memory import SharedMemory
from drp.protocol.messages import VERSION, Hello, Load, Loaded, Share, Shared, ToLeader


class Crew:
    """What workers are told before their first draft: the model, and where its weights lie.

    The first worker that has loaded the model copies its weights into shared memory; all use them from there.
    """

    def __init__(self, pool: Pool, model: str, ground: Ground) -> None:
        self._pool, self._model, self._ground = pool, model, ground
        self._due: dict[bytes, type[ToLeader]] = {}
        self._facts: Loaded | None = None
        self._first = ""
        self._weights: SharedMemory | None = None
        self._publisher: WorkerProcess | None = None
        self._published = False
        self._waiting: list[WorkerProcess] = []

    @property
    def facts(self) -> Loaded:
        """What the model is, once a worker has loaded it."""
        assert self._facts is not None
        return self._facts

    def expect(self, worker: WorkerProcess) -> None:
        """Begin with a worker that was just started."""
        self._due[worker.identity] = Hello

    def doing(self, worker: WorkerProcess) -> str:
        """Say what a worker has not done yet."""
        due = self._due[worker.identity]
        return {Hello: "start", Loaded: f"load {self._model!r} and start"}.get(due, "share its weights and start")

    def held_up_by(self, worker: WorkerProcess) -> WorkerProcess | None:
        """Return the worker that another waits for, which has done all that it can."""
        return self._publisher if worker in self._waiting else None

    def answer(self, worker: WorkerProcess, message: ToLeader) -> bool:
        """Take a worker's next word; return whether it is ready. Raise WorkerError for one that cannot be used."""
        due = self._due[worker.identity]
        if not isinstance(message, due):
            raise WorkerError(f"{worker} sent {type(message).__name__} where {due.__name__} was due")
        match message:
            case Hello(version):
                if version != VERSION:
                    raise WorkerError(f"{worker} speaks version {version} of the protocol, the leader {VERSION}")
                self._tell(worker, self._load(worker), Loaded)
            case Loaded():
                return self._on_loaded(worker, message)
            case Shared():
                del self._due[worker.identity]
                if worker == self._publisher:
                    self._publisher, self._published = None, True
                    self._share_on()
                return True
        return False

    def lose(self, worker: WorkerProcess) -> None:
        """Forget a worker; if it was copying the weights, another does."""
        self._due.pop(worker.identity, None)
        if worker in self._waiting:
            self._waiting.remove(worker)
        if worker == self._publisher:
            self._publisher = None
            self._share_on()

    def close(self) -> None:
        """Give the weights' memory back."""
        if self._weights is not None:
            self._weights.close()

    def _load(self, worker: WorkerProcess) -> Load:
        return Load(self._model, worker.device.emulated, self._ground.how(worker.number, worker.device))

    def _on_loaded(self, worker: WorkerProcess, loaded: Loaded) -> bool:
        """Give a worker its weights; return whether it needs none: on a GPU it keeps its own there."""
        if self._facts is None or self._weights is None:
            self._facts, self._first, self._weights = loaded, str(worker), SharedMemory.create(loaded.nbytes)
        if loaded.layout != self._facts.layout:
            raise WorkerError(
                f"{worker} made other weights of {self._model!r} than {self._first}; its factory must not vary"
            )
        if worker.device.gpu is not None:
            if why := self._ground.judge(worker.number, str(worker), loaded.unreached):
                raise WorkerError(why)
            del self._due[worker.identity]
            return True
        self._due[worker.identity] = Shared
        self._waiting.append(worker)
        self._share_on()
        return False

    def _share_on(self) -> None:
        """Let those that wait have the weights, or one of them bring them."""
        assert self._weights is not None
        if not self._published and self._publisher is None and self._waiting:
            self._publisher = self._waiting.pop(0)
            self._tell(self._publisher, Share(self._weights.handle, publish=True), Shared)
        while self._published and self._waiting:
            self._tell(self._waiting.pop(0), Share(self._weights.handle, publish=False), Shared)

    def _tell(self, worker: WorkerProcess, message: Load | Share, due: type[ToLeader]) -> None:
        self._due[worker.identity] = due
        self._pool.send(worker, message)
