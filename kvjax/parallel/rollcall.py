"""Who is there: processes find each other before jax starts, so that an absence can be told.

`jax.distributed.initialize` aborts the interpreter where a process is missing. So process 0 first
listens on the coordinator's port, hears every other one, and answers all of them with "go" or with
what is wrong; then the port is jax's.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time

from kvjax.core.errors import InputError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def address(coordinator: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT".

    Raises:
      InputError: no host, or no port from 1 to 65535.

    Example:
      >>> address("10.0.0.1:1234")
      ('10.0.0.1', 1234)
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(
            "coordinator",
            got=repr(coordinator),
            expected="HOST:PORT, as 10.0.0.1:1234",
            fix="name the machine of process 0 and a free port of it",
        )
    return host.strip("[]"), int(port)


def bind_host(host: str) -> str | None:
    """Where process 0 listens: on this machine only for a loopback host, else everywhere (None)."""
    return {"localhost": "127.0.0.1"}.get(host, host) if host in LOOPBACK else None


def hear_all(coordinator: str, processes: int, seconds: float) -> None:
    """Process 0: waits until all others have called in, and tells them to go on.

    Raises:
      InputError: some that do not come within `seconds`, ids that do not fit, a port in use.
    """
    deadline = time.monotonic() + seconds
    heard: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(coordinator))
        fault = None
        while fault is None and len(heard) < processes - 1:
            left = deadline - time.monotonic()
            listener.settimeout(max(left, 1e-3))
            try:
                caller = stack.enter_context(listener.accept()[0])
                caller.settimeout(max(min(left, 2.0), 0.1))
                said = json.loads(_line(caller))
                own, their = int(said["kvjax_process"]), int(said["processes"])
            except TimeoutError:
                if time.monotonic() >= deadline:
                    fault = _absent(processes, heard, seconds)
                continue
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of ours
            heard_before = own in heard or own == 0
            heard[own if not heard_before else -1] = caller
            fault = _misfit(processes, own, their, heard_before)
        for caller in heard.values():
            with contextlib.suppress(OSError):  # it has gone; jax tells
                caller.sendall(json.dumps({"fault": fault}).encode() + b"\n")
    if fault is not None:
        raise InputError(**fault)


def call_in(coordinator: str, processes: int, process_id: int, seconds: float) -> None:
    """Any other process: says that it is there, and waits for the word to go on.

    Raises:
      InputError: no coordinator within `seconds`; no answer for as long again; what process 0
        found wrong.
    """
    host, port = address(coordinator)
    with _connect(host, port, seconds) as line:
        line.settimeout(seconds + 5)
        try:
            said = {"kvjax_process": process_id, "processes": processes}
            line.sendall(json.dumps(said).encode() + b"\n")
            fault = json.loads(_line(line))["fault"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"coordinator {coordinator}",
                got=f"no answer to process {process_id} ({type(error).__name__})",
                expected="process 0 of this run",
                fix="see how it ended, or whether another program has the port",
            ) from None
    if fault is not None:
        raise InputError(**fault)


def _listen(coordinator: str) -> socket.socket:
    host, port = address(coordinator)
    bind = bind_host(host)
    try:
        if bind is None and socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512
            )
        family = socket.AF_INET6 if bind == "::1" else socket.AF_INET
        return socket.create_server((bind or "", port), family=family, backlog=512)
    except OSError as error:
        raise InputError(
            f"coordinator {coordinator}",
            got=f"a port that process 0 cannot have ({error.strerror})",
            expected="a free port",
            fix="choose another, and see that there is one process 0 only",
        ) from None


def _connect(host: str, port: int, seconds: float) -> socket.socket:
    deadline, last = time.monotonic() + seconds, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            return socket.create_connection((host, port), timeout=left)
        except OSError as error:
            last = error.strerror or str(error) or type(error).__name__
            time.sleep(min(0.1, max(left, 0.0)))
    raise InputError(
        f"coordinator {host}:{port}",
        got=f"nobody there for {seconds:g} s ({last})",
        expected="process 0 on that machine",
        fix="start it, check the address, or raise the timeout",
    )


def _line(line: socket.socket) -> bytes:
    """What comes until the end of a line, of at most 4 KiB."""
    with line.makefile("rb") as stream:
        return stream.readline(4096)


def _absent(processes: int, heard: dict[int, socket.socket], seconds: float) -> dict[str, str]:
    missing = [n for n in range(1, processes) if n not in heard]
    names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return {
        "what": "processes",
        "got": f"nothing from {names} of 0 to {processes - 1} for {seconds:g} s",
        "expected": "all of them",
        "fix": "start them, see how they ended, or raise the timeout",
    }


def _misfit(processes: int, own: int, their: int, twice: bool) -> dict[str, str] | None:
    if their != processes:
        got = f"process {own} of {their}, and process 0 of {processes}"
    elif not 0 <= own < processes:
        got = f"process {own} of {processes}"
    elif twice:
        got = f"process {own} twice"
    else:
        return None
    return {
        "what": "process ids",
        "got": got,
        "expected": "each of 0 to N - 1 once, with the same N",
        "fix": "give every process its own id",
    }
