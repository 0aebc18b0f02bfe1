"""Who of several processes is here: process 0 keeps the list, and all hear when one is missing, dies or fails.

jax alone leaves them in the dark: a collective waits forever for a dead peer, or its process is aborted without a word.
Every process, the first included, holds one connection to process 0 and writes a line of text a second:

    here 2 4            I am process 2 of 4                  go 10.0.0.2:4711    all are here; jax meets there
    .                   I am alive                           .                   so is process 0
    bye 1 no room       I end with this exit code            bye all / bye alone you may go: with all others, or alone
                                                             end ...             the job is over, for this reason
A closed connection is a death that is heard at once; a silent one counts after the timeout.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from jraggym.errors import PREEMPTED, InputError

PERIOD = 1.0  # seconds between signs of life
GRACE = 2.0  # seconds for all to report the same failure, or a death that is behind it


class Line:
    """A connection that carries lines of text."""

    def __init__(self, connection: socket.socket):
        self.connection, self.heard, self.ended = connection, time.monotonic(), False
        self._rest = b""

    def send(self, text: str) -> None:
        """Writes a line; a connection that has ended says so when it is read."""
        try:
            self.connection.sendall(text.replace("\n", " ").encode() + b"\n")
        except OSError:
            self.ended = True

    def close(self) -> None:
        """Ends the connection behind what was sent: closed with something unread, it would lose that."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(PERIOD)
        while not self.ended and self.read():
            pass
        self.connection.close()

    def read(self) -> list[str]:
        """The lines that have come since, none after a timeout; sets `ended` at the end of the connection."""
        try:
            found = self.connection.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            found = b""
        self.ended = not found
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + found).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


def endpoint(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT; InputError for anything else."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InputError("an address of process 0 is HOST:PORT", got=repr(address), remedy="Give, say, 10.0.0.2:8475.")
    return host.strip("[]"), int(port)


@dataclass
class Hub:
    """The list that process 0 keeps, in a thread of its own; `meet` is the address that jax uses."""

    address: str
    number: int
    timeout: float
    meet: str
    hint: str = ""  # what to do about missing processes
    _lines: dict[int, Line] = field(default_factory=dict)
    _left: dict[int, tuple[int, str]] = field(default_factory=dict)
    _strangers: list[Line] = field(default_factory=list)  # who have not said which process they are

    def start(self) -> None:
        """Listens and returns; raises InputError when the address is not of this machine, or taken."""
        host, port = endpoint(self.address)
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            self._server = socket.create_server((host, port), family=family, backlog=self.number)
        except OSError as error:
            remedy = "Give a free port of the machine that runs process 0."
            raise InputError(f"process 0 cannot listen on {self.address}", got=error, remedy=remedy) from error
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        threading.Thread(target=self._run, daemon=True, name="roll call").start()

    def _run(self) -> None:
        try:
            self._call()
        finally:
            self._server.close()
            for line in (*self._lines.values(), *self._strangers):
                line.close()

    def _call(self) -> None:
        start = ticked = time.monotonic()
        gone, failed_at = False, None
        while True:
            for key, _ in self._selector.select(PERIOD / 4):
                self._hear(key.data)
            now = time.monotonic()
            if now - ticked >= PERIOD:
                ticked = now
                self._tell(".")
            if not gone and len(self._lines) == self.number:
                gone = True
                self._tell(f"go {self.meet}")
            if len(self._left) == self.number:
                return self._tell("bye all")
            if reason := self._lost(now) or (self._missing() if not gone and now - start > self.timeout else ""):
                return self._tell(f"end {reason}")
            if codes := {code for code, _ in self._left.values()} - {0}:
                failed_at = failed_at or now
                # All save at the same step when they are preempted, and some have more to do after it.
                if now - failed_at > (self.timeout if codes == {PREEMPTED} else GRACE):
                    return self._blame()

    def _hear(self, line: Line | None) -> None:
        if line is None:
            connection, _ = self._server.accept()
            line = Line(connection)
            self._strangers.append(line)
            self._selector.register(connection, selectors.EVENT_READ, line)
            return
        try:
            for text in line.read():
                word, _, rest = text.partition(" ")
                if word == "here":
                    self._enter(line, rest)
                elif word == "bye":
                    code, _, why = rest.partition(" ")
                    self._left[self._name(line)] = int(code), why
        except (ValueError, StopIteration):  # whoever that is, it is no process of this job
            line.ended = True
        if line.ended:
            self._selector.unregister(line.connection)

    def _enter(self, line: Line, text: str) -> None:
        process, number = map(int, text.split())
        if number != self.number or process in self._lines:
            other = f"a job of {number}" if number != self.number else "another one has that number"
            line.send(f"end process {process} is not one of this job of {self.number}: {other}")
            return
        self._lines[process] = line
        self._strangers.remove(line)

    def _name(self, line: Line) -> int:
        return next(process for process, known in self._lines.items() if known is line)

    def _lost(self, now: float) -> str:
        """What is to be said of the first process that has died."""
        for process, line in self._lines.items():
            if line.ended and process not in self._left:
                return f"process {process} of {self.number} has died: look at its own messages, and start all again."
            if now - line.heard > self.timeout and process not in self._left:
                said = f"process {process} of {self.number} has given no sign of life for {self.timeout:g} s"
                return f"{said}: look whether its machine is up, and start all again."
        return ""

    def _missing(self) -> str:
        absent = [str(p) for p in range(self.number) if p not in self._lines]
        names = f"process {absent[0]}" if len(absent) == 1 else f"processes {', '.join(absent)}"
        return f"{names} of {self.number} did not arrive at {self.address} within {self.timeout:g} s: {self.hint}"

    def _blame(self) -> None:
        """Ends the job for those that have not failed themselves."""
        process, (code, why) = next((p, left) for p, left in self._left.items() if left[0])
        reason = f"process {process} of {self.number} has ended with exit code {code}: {why or 'see its own messages'}"
        failed = {p for p, (code, _) in self._left.items() if code}
        self._tell("bye alone", lambda p: p in failed)  # before the others: with process 0 the hub ends
        self._tell(f"end {reason}", lambda p: p not in failed)

    def _tell(self, text: str, whom: Callable[[int], bool] = lambda process: True) -> None:
        for process in sorted(self._lines, reverse=True):  # process 0 last: when it ends, so does the hub
            if whom(process):
                self._lines[process].send(text)


class Member:
    """One process's connection to the hub; `lost(sentence)` is called, from another thread, when the job is over."""

    def __init__(self, process: int, number: int, lost: Callable[[str], None]):
        self._process, self._number, self._lost = process, number, lost
        self._go, self._over = threading.Event(), threading.Event()
        self._meet, self._farewell = "", ""

    def arrive(self, address: str, timeout: float, hint: str = "") -> str:
        """Waits for all the others, and gives the address where jax meets; calls `lost` after `timeout` seconds."""
        connection, deadline = None, time.monotonic() + timeout
        while connection is None and time.monotonic() < deadline:
            try:
                connection = socket.create_connection(endpoint(address), timeout=PERIOD)
            except OSError:
                time.sleep(PERIOD / 4)
        if connection is None:
            self._lost(f"process 0 of {self._number} did not answer at {address} within {timeout:g} s: {hint}")
            raise SystemExit(1)  # `lost` ends the process
        connection.settimeout(PERIOD)
        self._line, self._timeout = Line(connection), timeout
        self._line.send(f"here {self._process} {self._number}")
        threading.Thread(target=self._listen, daemon=True, name="roll call of process 0").start()
        self._go.wait()
        return self._meet

    def leave(self, code: int = 0, why: str = "") -> bool:
        """Says that this process ends; True when all the others do, False when it is alone with its failure.

        With code 0, and preempted, it waits for all the others.
        """
        self._line.send(f"bye {code} {why}")
        self._over.wait(None if code in (0, PREEMPTED) else 3 * GRACE)
        return self._farewell == "all"

    def _listen(self) -> None:
        self._hear()
        self._line.close()

    def _hear(self) -> None:
        """Until the job is over, for whatever reason."""
        while True:
            for text in self._line.read():
                word, _, rest = text.partition(" ")
                if word == "go":
                    self._meet = rest
                    self._go.set()
                elif word == "bye":
                    self._farewell = rest
                    return self._over.set()
                elif word == "end":
                    return self._lost(rest)
            silent = time.monotonic() - self._line.heard > self._timeout
            if self._line.ended or silent:
                how = f"given no sign of life for {self._timeout:g} s" if silent else "died"
                return self._lost(f"process 0 of {self._number} has {how}: look at its messages, and start all again.")
            self._line.send(".")
