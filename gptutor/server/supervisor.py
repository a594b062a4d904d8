"""The master process: it keeps the worker processes running, and replaces them all at SIGHUP without losing a request.

It has no event loop, no database connection, no journal and no threads. It owns the listening sockets, forks the workers, and
waits for signals, which are blocked except while it waits: none is lost, also while it re-executes the program.

A worker tells its state through a pipe: BEAT while its event loop runs, READY when it serves, FAULT and a sentence when it cannot
start. One that dies is replaced, with growing pauses if it happens again and again; one that is silent for too long is killed.

A replacement:

1. `gptutor check` of the program and settings that are on disk now. If it finds a mistake, nothing else happens.
2. The master re-executes the program, in its own process: the service manager sees the same main process, and a new release
   is taken over as well as new settings. Listening sockets, pipes and children stay; `Handover` says what they are.
3. New workers start and accept connections beside the old ones. When all of them serve, the old ones are told to stop. They
   finish their requests and settle the charges. If a new one cannot start, the old ones go on.
"""

import contextlib
import json
import logging
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from os import _exit as end_process
from typing import NoReturn

from gptutor import __version__
from gptutor.server import service_manager
from gptutor.server.reload import LastReload, SettingsCheck, own_command

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
SIGNALS = frozenset({*STOP_SIGNALS, signal.SIGHUP, signal.SIGCHLD})
BEAT, READY, FAULT = b".", b"r", b"!"
BOOT_ERROR = 3
"""The exit code of a worker that cannot start."""
HUNG_S = 60.0
"""A worker whose event loop has not run for so long is killed; its journal is replayed by another."""
START_S = 120.0
"""A new worker that does not serve after so long cannot start. Its event loop may hang meanwhile: it reads a long journal."""
TICK_S, BUSY_TICK_S = 0.5, 0.05
PAUSE_S, PAUSE_MAX_S = 1.0, 30.0
"""Before a worker that lived shorter than STABLE_S is replaced; doubled each time."""
STABLE_S = 10.0
HANDOVER_VARIABLE = "_GPTUTOR_HANDOVER"
FAULT_BYTES_MAX = 2000

Report = Callable[[int, str], None]
"""Writes a line of that level into the log."""


class MasterLink:
    """A worker's end of its pipe."""

    def __init__(self, pipe: int, master: int) -> None:
        self._pipe = pipe
        self._master = master
        os.set_blocking(pipe, False)

    def beat(self) -> bool:
        """Tells that the event loop runs. Returns whether the master lives."""
        self._send(BEAT)
        return os.getppid() == self._master

    def ready(self) -> None:
        """Tells that this process serves."""
        self._send(READY)

    def fault(self, sentence: str) -> None:
        """Tells why this process cannot start."""
        self._send(FAULT + sentence.encode(errors="replace")[:FAULT_BYTES_MAX])

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # the master is gone, or has not read for hours
            os.write(self._pipe, message)


@dataclass(frozen=True, slots=True)
class Plan:
    """How a generation of workers runs."""

    processes: int
    run: Callable[[MasterLink], int]
    """The life of a worker, in its own process; returns the exit code. Signals are blocked when it begins."""
    stop_s: float
    """A worker that has not ended so long after SIGTERM is killed."""


@dataclass(slots=True)
class WorkerProcess:
    pid: int
    pipe: int
    started_at: float
    """This and the other times are those of time.monotonic(), which outlives the execution of a new program."""
    beat_at: float
    is_ready: bool = False
    is_old: bool = False
    """Whether it gives way as soon as its successors serve."""
    kill_at: float | None = None
    """Set when it was told to stop."""
    fault: str | None = None


@dataclass(slots=True)
class Handover:
    """What a master leaves to the program that takes its place in the same process."""

    version: str
    sockets: dict[str, int]
    """Address → file descriptor."""
    workers: list[WorkerProcess]
    last_reload: tuple[bool, float]
    last_reload_descriptor: int | None = None
    """None: of a program that did not hand it over."""
    pid: int = field(default_factory=os.getpid)

    @property
    def descriptors(self) -> list[int]:
        memory = [] if self.last_reload_descriptor is None else [self.last_reload_descriptor]
        return [*self.sockets.values(), *(one.pipe for one in self.workers), *memory]

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def take(cls) -> "Handover | None":
        """Of the program that was executed in this process before, if there was one. Further calls return None.

        Another release may have written it, or may read it: names can be added, and must not go.
        """
        text = os.environ.pop(HANDOVER_VARIABLE, None)
        if text is None or (given := json.loads(text))["pid"] != os.getpid():  # a stray variable of another process
            return None
        known = {each.name for each in fields(WorkerProcess)}
        workers = [WorkerProcess(**{name: worker[name] for name in worker.keys() & known}) for worker in given["workers"]]
        for one in workers:
            one.is_old = one.kill_at is None
        succeeded, at = given["last_reload"]
        handover = cls(given["version"], given["sockets"], workers, (succeeded, at), given.get("last_reload_descriptor"))
        for descriptor in handover.descriptors:
            os.set_inheritable(descriptor, False)
        return handover


def block_signals() -> None:
    """From here on signals wait until the supervisor looks at them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class Supervisor:
    def __init__(
        self,
        plan: Plan | None,
        listeners: dict[str, socket.socket],
        report: Report,
        *,
        last_reload: LastReload,
        predecessor: Handover | None = None,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """`plan` is None if the predecessor's workers cannot be replaced: these go on. `on_start` is called when all serve."""
        self._plan = plan
        self._listeners = listeners
        self._report = report
        self._last_reload = last_reload
        self._on_start = on_start
        self._workers = predecessor.workers if predecessor else []
        self._is_reloading = predecessor is not None
        """Whether the old workers give way as soon as the new ones serve."""
        self._replaced_version = predecessor.version if predecessor else __version__
        self._has_served = predecessor is not None
        self._wanted = plan.processes if plan else 0
        self._check: SettingsCheck | None = None
        self._reload_is_due = False
        self._is_stopping = False
        self._exit_code = 0
        self._spawn_at = 0.0
        self._pause_s = PAUSE_S
        self._watchdog_s = service_manager.watchdog_s()
        self._hung_s = min(HUNG_S, self._watchdog_s / 2) if self._watchdog_s else HUNG_S
        self._fed_at = 0.0

    def run(self) -> int:
        """Until all workers have ended after SIGTERM, SIGINT or SIGQUIT. Returns the exit code."""
        block_signals()
        while not (self._is_stopping and not self._workers):
            self._read_pipes()  # before anything is decided: an older program may have had no time to read them
            self._reap()
            self._maintain()
            received = signal.sigtimedwait(SIGNALS, TICK_S if self._is_settled else BUSY_TICK_S)
            if received is not None and received.si_signo in STOP_SIGNALS:
                self._stop()
            elif received is not None and received.si_signo == signal.SIGHUP:
                self._reload_is_due = True
        return self._exit_code

    @property
    def _is_settled(self) -> bool:
        return not self._is_reloading and self._check is None and all(one.is_ready for one in self._workers)

    @property
    def _serving(self) -> list[WorkerProcess]:
        """Those that are not told to stop and have no successors."""
        return [one for one in self._workers if one.kill_at is None and not one.is_old]

    def _maintain(self) -> None:
        now = time.monotonic()
        for one in self._workers:
            if one.kill_at is not None and now > one.kill_at:
                self._report(logging.ERROR, f"Process {one.pid} did not end in time, and is killed.")
                one.kill_at = math.inf
                os.kill(one.pid, signal.SIGKILL)
            elif one.is_ready and now - one.beat_at > self._hung_s:
                self._report(
                    logging.ERROR, f"The event loop of process {one.pid} has not run for {self._hung_s:.0f} s: it is killed."
                )
                one.beat_at = math.inf
                os.kill(one.pid, signal.SIGKILL)
            elif one.kill_at is None and not one.is_ready and now - one.started_at > START_S:
                one.fault = one.fault or f"it did not serve within {START_S:.0f} s"
                os.kill(one.pid, signal.SIGKILL)
        if self._is_stopping:
            return
        if self._plan is None and not self._workers:
            self._exit_code = 1  # the service manager starts it again
            self._stop()
            return
        if self._check is not None:
            self._check.kill_if_late()
        while self._plan is not None and len(self._serving) < self._wanted and now >= self._spawn_at:
            self._spawn(self._plan)
        if self._serving and len(self._serving) >= self._wanted and all(one.is_ready for one in self._serving):
            self._all_serve()
        if self._reload_is_due and not self._is_reloading and self._check is None and self._has_served:
            self._begin_reload()

    # -- workers

    def _spawn(self, plan: Plan) -> None:
        read_end, write_end = os.pipe()
        master = os.getpid()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            for one in self._workers:
                os.close(one.pipe)
            self._become_worker(plan, MasterLink(write_end, master))
        os.close(write_end)
        os.set_blocking(read_end, False)
        now = time.monotonic()
        self._workers.append(WorkerProcess(pid, read_end, started_at=now, beat_at=now))

    def _become_worker(self, plan: Plan, link: MasterLink) -> NoReturn:
        """Nothing of the master's own runs in the child: not its `finally`s, nor its exit handlers."""
        code = 1
        try:
            code = plan.run(link)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            end_process(code)

    def _read_pipes(self) -> None:
        now = time.monotonic()
        has_beaten = any(not one.is_ready for one in self._workers)
        for one in self._workers:
            data = b""
            with contextlib.suppress(BlockingIOError):
                data = os.read(one.pipe, 65536)
            signs, _, fault = data.partition(FAULT)
            if signs:
                one.beat_at, has_beaten = now, True
            one.is_ready = one.is_ready or READY in signs
            if fault:
                one.fault = fault.decode(errors="replace")
        if has_beaten and self._watchdog_s and now - self._fed_at > self._watchdog_s / service_manager.MESSAGES_PER_WATCHDOG:
            self._fed_at = now
            service_manager.notify_watchdog()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._check is not None and pid == self._check.pid:
                refusal, self._check = self._check.refusal(status), None
                self._end_check(refusal)
            for one in [one for one in self._workers if one.pid == pid]:
                self._workers.remove(one)
                os.close(one.pipe)
                if one.kill_at is None and not self._is_stopping:
                    self._died(one, os.waitstatus_to_exitcode(status))

    def _died(self, worker: WorkerProcess, code: int) -> None:
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        reason = worker.fault or f"it ended {how}"
        if worker.is_old:
            self._report(logging.ERROR, f"Process {worker.pid} died before it was replaced: {reason}.")
        elif not worker.is_ready and self._is_reloading:
            self._give_up_reload(reason)
        elif not worker.is_ready and not self._has_served:
            self._report(logging.ERROR, f"The service cannot start: {reason}")
            print(f"gptutor: {worker.fault or f'A process of the service {reason}.'}", file=sys.stderr, flush=True)
            self._exit_code = 1
            self._stop()
        else:
            now = time.monotonic()
            quickly = now - worker.started_at < STABLE_S
            self._spawn_at = now + self._pause_s if quickly else 0.0
            self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S) if quickly else PAUSE_S
            self._report(logging.ERROR, f"Process {worker.pid} died, and is replaced: {reason}.")

    def _retire(self, workers: list[WorkerProcess]) -> None:
        stop_s = self._plan.stop_s if self._plan else START_S
        for one in workers:
            one.kill_at = one.kill_at or time.monotonic() + stop_s
            os.kill(one.pid, signal.SIGTERM)

    def _stop(self) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        service_manager.notify_stopping()
        if self._check is not None:
            os.kill(self._check.pid, signal.SIGKILL)
            self._check = None
        self._retire(self._workers)

    # -- the start and replacements

    def _all_serve(self) -> None:
        if not self._has_served:
            self._has_served = True
            self._report(logging.INFO, f"GPTutor {__version__} has started, with {_processes(self._wanted)}")
            self._on_start()
            self._tell_ready()
        elif self._is_reloading and self._plan is not None:
            self._is_reloading = False
            self._retire([one for one in self._workers if one.is_old and one.kill_at is None])
            self._last_reload.record(succeeded=True)
            before = f", in place of {self._replaced_version}" if self._replaced_version != __version__ else ""
            self._report(logging.INFO, f"Reloaded: {_processes(self._wanted, 'new ')} of GPTutor {__version__} serve{before}")
            self._tell_ready()

    def _tell_ready(self, obstacle: str = "") -> None:
        status = f"GPTutor {__version__}, {_processes(self._wanted)} serve"
        service_manager.notify_ready(f"{status}. The last reload failed: {obstacle}" if obstacle else status)

    def _begin_reload(self) -> None:
        self._reload_is_due = False
        service_manager.notify_reloading()
        try:
            self._check = SettingsCheck()
        except OSError as error:
            self._reject_reload(f"{own_command()[0]} cannot be run: {error.strerror}.")

    def _end_check(self, refusal: str | None) -> None:
        if self._is_stopping:
            return
        if refusal is not None:
            self._reject_reload(refusal)
            return
        try:
            self._execute_anew()
        except OSError as error:
            self._reject_reload(f"{own_command()[0]} cannot be run: {error.strerror}.")

    def _execute_anew(self) -> None:
        """Does not return. Raises OSError, and then nothing has changed."""
        sockets = {address: listener.fileno() for address, listener in self._listeners.items()}
        handover = Handover(__version__, sockets, self._workers, self._last_reload.values, self._last_reload.descriptor)
        command = own_command(*sys.argv[1:])
        os.environ[HANDOVER_VARIABLE] = handover.encode()
        for descriptor in handover.descriptors:
            os.set_inheritable(descriptor, True)
        try:
            os.execv(command[0], command)  # noqa: S606 - this very program
        finally:
            del os.environ[HANDOVER_VARIABLE]
            for descriptor in handover.descriptors:
                os.set_inheritable(descriptor, False)

    def _reject_reload(self, obstacle: str) -> None:
        """Nothing has been replaced yet."""
        self._last_reload.record(succeeded=False)
        self._report(logging.ERROR, f"The reload is refused, and the previous settings stay in effect: {obstacle}")
        self._tell_ready(obstacle)

    def _give_up_reload(self, obstacle: str) -> None:
        """The predecessors go on."""
        self._is_reloading = False
        self._retire([one for one in self._workers if not one.is_old and one.kill_at is None])
        for one in self._workers:
            one.is_old = False
        self._wanted = len(self._serving) or self._wanted
        self._reject_reload(obstacle)

    def refuse(self, obstacle: str) -> None:
        """To be called before `run`, if there is no plan."""
        self._give_up_reload(obstacle)


def _processes(count: int, kind: str = "") -> str:
    return f"{count} {kind}process{'' if count == 1 else 'es'}"
