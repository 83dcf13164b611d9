"""Several processes, on one machine or on many, as one: `jax.distributed`, and clear errors.

Every process runs the same script. Its first line is `start` or `start_from_environment`; from then
on `jax.devices()`, and so `make_mesh`, has the devices of all of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from kvjax.core.errors import InputError
from kvjax.parallel.rollcall import address, bind_host, call_in, hear_all

TIMEOUT = 30.0  # s, for all processes to come
LONGEST = 86_400  # s, a day: the most that a timeout may be
HEARTBEAT = 20  # s, after which a silent process counts as dead
SHUTDOWN = 300  # s, that one at its end waits for the others, before all of them are ended
ENVIRONMENT = {
    "coordinator": "KVJAX_COORDINATOR",
    "processes": "KVJAX_PROCESSES",
    "process_id": "KVJAX_PROCESS_ID",
    "local_devices": "KVJAX_LOCAL_DEVICES",
    "timeout": "KVJAX_TIMEOUT",
}
_NEEDED = ("coordinator", "processes", "process_id")


def start(
    coordinator: str,
    processes: int,
    process_id: int,
    local_devices: int | None = None,
    timeout: float = TIMEOUT,
) -> None:
    """Joins `processes` processes into one program; call it before jax has any device.

    Process 0 is the coordinator. It waits `timeout` seconds for the others; they wait as long for
    it, and then at most as long again for those that are still missing. Later, a process that dies
    ends the others: at their next exchange with it, or after `HEARTBEAT` (20 s). One that raises
    ends at once, with its traceback and status 1; at an ordinary exit, `sys.exit` too, it waits for
    the others up to `SHUTDOWN` (5 minutes).

    Args:
      coordinator: "HOST:PORT", where process 0 listens; the same for all.
      process_id: of this process, 0 to `processes` - 1.
      local_devices: how many devices this process has: CPUs are simulated, of GPUs it takes the
        first ones that it sees. None takes what there is.
      timeout: seconds to wait for processes that are not there yet.
    Raises:
      InputError: ids that do not fit, a coordinator or other processes that do not come in time,
        fewer devices than asked for, devices that jax has made already.

    Example:
      >>> start("10.0.0.1:1234", 2, 0, local_devices=2)  # doctest: +SKIP
      >>> rules = ShardingRules(make_mesh(heads=2, sequence=2))  # doctest: +SKIP
    """
    host, port = address(coordinator)
    for what, value in {"processes": processes, "local_devices": local_devices}.items():
        if value is not None and value < 1:
            raise InputError(what, got=value, expected="1 or more", fix="raise it")
    if not 0 <= process_id < processes:
        raise InputError(
            "process_id",
            got=f"{process_id} of {processes} processes",
            expected=f"0 to {processes - 1}",
            fix="give every process its own id, from 0 on",
        )
    check_timeout("timeout", timeout)
    _be_first()
    if local_devices is not None:
        jax.config.update("jax_num_cpu_devices", local_devices)
        for gpus in "jax_cuda_visible_devices", "jax_rocm_visible_devices":
            jax.config.update(gpus, ",".join(map(str, range(local_devices))))
    if processes > 1:
        if process_id == 0:
            hear_all(coordinator, processes, timeout)
        else:
            call_in(coordinator, processes, process_id, timeout)
        bind = bind_host(host)
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            local_device_ids=None if local_devices is None else range(local_devices),
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, round(timeout)),
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
            coordinator_bind_address=None if bind is None else _join(bind, port),
        )
        _end_on_error()
    found = jax.local_device_count()
    if local_devices is not None and found != local_devices:
        raise InputError(
            "local_devices",
            got=f"{local_devices} of process {process_id}, which has {found}",
            expected="as many as there are",
            fix="ask for fewer, or start fewer processes on this machine",
        )


def start_from_environment(environment: Mapping[str, str] | None = None) -> bool:
    """`start` with what `kvjax launch` has put into the environment; nothing without it.

    KVJAX_COORDINATOR, KVJAX_PROCESSES and KVJAX_PROCESS_ID go together; KVJAX_LOCAL_DEVICES and
    KVJAX_TIMEOUT (s) may be left out.

    Returns:
      Whether there was something to start.
    Raises:
      InputError: some variables without the others, no numbers, or what `start` finds wrong.

    Example:
      >>> start_from_environment({})
      False
    """
    given = os.environ if environment is None else environment
    found = {what: given[name] for what, name in ENVIRONMENT.items() if given.get(name)}
    if not found:
        return False
    if missing := [ENVIRONMENT[what] for what in _NEEDED if what not in found]:
        raise InputError(
            "environment",
            got=f"{', '.join(ENVIRONMENT[w] for w in found)} without {', '.join(missing)}",
            expected="KVJAX_COORDINATOR, KVJAX_PROCESSES and KVJAX_PROCESS_ID together",
            fix="set them, or use kvjax launch",
        )
    arguments: dict[str, Any] = {}
    for what, text in found.items():
        read = {"coordinator": str, "timeout": float}.get(what, int)
        try:
            arguments[what] = read(text)
        except ValueError:
            raise InputError(
                ENVIRONMENT[what], got=repr(text), expected="a number", fix="mend it"
            ) from None
    start(**arguments)
    return True


def check_timeout(what: str, seconds: float) -> None:
    """Raises `InputError` for what is no time to wait."""
    if not 0 < seconds <= LONGEST:
        raise InputError(
            what, got=seconds, expected=f"seconds, above 0 and up to {LONGEST}", fix="choose such"
        )


def fetch(tree: Any) -> Any:
    """The whole arrays of a tree as numpy, in every process; all processes must call it.

    Random keys come as the words that they are made of (`jax.random.key_data`).

    Example:
      >>> fetch({"tokens": jax.numpy.arange(3)})
      {'tokens': array([0, 1, 2], dtype=int32)}
    """

    def one(a: Any) -> np.ndarray:
        if isinstance(a, jax.Array) and jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a = jax.random.key_data(a)
        if isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated):
            return multihost_utils.process_allgather(a, tiled=True)
        return np.asarray(a)

    return jax.tree.map(one, tree)


def _be_first() -> None:
    """Raises `InputError` where jax has devices already, or has been started."""
    try:
        if jax.distributed.is_initialized():
            raise RuntimeError
        now: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
        jax.config.update("jax_num_cpu_devices", now + 1)  # refused once there are devices
        jax.config.update("jax_num_cpu_devices", now)
    except RuntimeError:
        raise InputError(
            "start",
            got="a jax that has its devices already",
            expected="to come before any array or jax.devices()",
            fix="make it the first line after the imports",
        ) from None


def _end_on_error() -> None:
    shown = sys.excepthook

    def hook(kind, error, trace):
        shown(kind, error, trace)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = hook


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
