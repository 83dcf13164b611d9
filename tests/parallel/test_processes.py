"""Two real processes as one program, and every way in which one of them can be missing."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import process_worker
import pytest
from test_sharded import CONFIG, weights

from kvjax.cli import workers
from kvjax.cli.launch import free_port
from kvjax.core.errors import InputError
from kvjax.generate import generate, make_plan
from kvjax.parallel import fetch, start, start_from_environment
from kvjax.parallel.rollcall import call_in, hear_all

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NEW = {  # of a process without pytest, whose first CPU devices are its own
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "PYTHONPATH": f"{ROOT}:{HERE}",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def run_two(words, devices):
    """The words in two processes of one program."""
    shared = NEW | {
        "KVJAX_COORDINATOR": f"127.0.0.1:{free_port()}",
        "KVJAX_PROCESSES": "2",
        "KVJAX_LOCAL_DEVICES": str(devices),
        "KVJAX_TIMEOUT": "60",
    }
    workers.run_all(
        [sys.executable, *words], [shared | {"KVJAX_PROCESS_ID": str(n)} for n in (0, 1)]
    )


def test_two_processes_generate_what_one_does(tmp_path):
    params = weights(CONFIG)
    np.savez(tmp_path / "weights.npz", *map(np.asarray, jax.tree.leaves(params)))
    run_two([str(HERE / "process_worker.py"), str(tmp_path)], devices=2)
    zero, one = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (0, 1))
    plan = make_plan(CONFIG, process_worker.method())
    prompts = process_worker.prompts()
    want, state = generate(plan, params, prompts, max_new=process_worker.MAX_NEW)
    assert zero["tokens"] == one["tokens"] == np.asarray(want).tolist()
    assert zero["packed"] == one["packed"] == state.caches[0].packed.tolist()
    more, _ = process_worker.in_two_parts(plan, params)
    assert zero["more"] == one["more"] == np.asarray(more).tolist()
    assert min(map(min, zero["packed"])) > 0  # some pages of every sequence are packed
    assert zero["devices"] == one["devices"] == [4, 2]
    # Every page is in one process only, and what is fetched is the whole.
    assert len(zero["here"]) == len(one["here"]) == 2
    assert sum(zero["here"]) + sum(one["here"]) == zero["pages"] == one["pages"]
    assert zero["sum"] == one["sum"] > 0
    for found in zero, one:
        assert "params: got other weights in process 1 than in process 0" in found["weights"]
    assert "got 1 devices of 1 processes; expected some of each of the 2" in one["mesh"]


def test_one_that_is_killed_ends_the_run():
    script = """
import os, jax
from kvjax.parallel import start_from_environment
assert start_from_environment()
from jax.experimental.multihost_utils import process_allgather
for step in range(10**6):
    if process_allgather(jax.numpy.ones(1)).sum() == 2 and step == 20 and jax.process_index() == 1:
        os.kill(os.getpid(), 9)
"""
    with pytest.raises(InputError, match=r"process 1 of 2: got exit code -9 \(SIGKILL\)"):
        run_two(["-c", script], devices=1)


def test_start_in_a_process_of_its_own():
    script = f"""
from kvjax.parallel import start, start_from_environment
for processes, n, devices in (2, 1, 1), (2, 0, 1), (1, 0, 3), (1, 0, 3):
    try:
        start("127.0.0.1:{free_port()}", processes, n, local_devices=devices, timeout=0.5)
        import jax
        print(len(jax.devices()), start_from_environment(), jax.config._read("jax_cuda_visible_devices"))
    except ValueError as error:
        print(error)
"""
    told = subprocess.run(
        [sys.executable, "-c", script],
        env={k: v for k, v in os.environ.items() if "KVJAX" not in k} | NEW,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout.splitlines()
    assert re.match(r"coordinator 127.0.0.1:\d+: got nobody there for 0.5 s \(.+\); exp", told[0])
    assert "processes: got nothing from 1 of 0 to 1 for 0.5 s; expected all of them" in told[1]
    assert told[2] == "3 False 0,1,2"  # GPUs too, had there been more than three
    assert "start: got a jax that has its devices already" in told[3]


def call_all(processes, *calls, seconds=20.0):
    """What each process is told; the first is process 0, the others say (id, processes)."""
    where = f"127.0.0.1:{free_port()}"

    def told(f, *args):
        try:
            f(where, *args, seconds)
        except InputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        others = [pool.submit(told, call_in, total, own) for own, total in calls]
        time.sleep(0.2)  # they come before process 0
        first = pool.submit(told, hear_all, processes)
        return [job.result() for job in (first, *others)]


def test_roll_call():
    assert call_all(3, (1, 3), (2, 3)) == [None] * 3
    assert all("got process 1 twice" in told for told in call_all(3, (1, 3), (1, 3)))
    assert all("process 1 of 3, and process 0 of 2" in told for told in call_all(2, (1, 3)))
    assert all("got process 2 of 2" in told for told in call_all(2, (2, 2)))
    assert all("got process 0 twice" in told for told in call_all(2, (0, 2)))
    before = time.monotonic()
    told = call_all(4, (2, 4), seconds=0.7)
    assert all("got nothing from 1, 3 of 0 to 3 for 0.7 s" in t for t in told)
    assert 0.5 < time.monotonic() - before < 10


def test_roll_call_among_strangers():
    where = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor() as pool:
        zero = pool.submit(hear_all, where, 2, 20.0)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"processes": 2}\n', b""):
            stranger = connect(where)
            stranger.sendall(said)
            stranger.close()
        call_in(where, 2, 1, 20.0)
        assert zero.result() is None
    with socket.create_server(("127.0.0.1", 0)) as other:
        where = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(InputError, match="got a port that process 0 cannot have"):
            hear_all(where, 2, 1.0)
        threading.Thread(target=lambda: other.accept()[0].sendall(b"200 OK\n"), daemon=True).start()
        with pytest.raises(InputError, match="got no answer to process 1"):
            call_in(where, 2, 1, 1.0)


def connect(where):
    host, port = where.split(":")
    for _ in range(200):
        try:
            return socket.create_connection((host, int(port)), timeout=5)
        except OSError:
            time.sleep(0.05)
    raise AssertionError(where)


def test_mistakes_are_told():
    here = "127.0.0.1:1234"
    for arguments, message in (
        (("nowhere", 2, 0), "coordinator: got 'nowhere'"),
        (("host:0", 2, 0), "coordinator: got 'host:0'"),
        ((here, 0, 0), "processes: got 0"),
        ((here, 2, 2), "process_id: got 2 of 2 processes; expected 0 to 1"),
        ((here, 2, -1), "process_id: got -1"),
        ((here, 2, 0, 0), "local_devices: got 0"),
        ((here, 2, 0, 1, 0.0), "timeout: got 0.0"),
        ((here, 2, 0, 1, float("inf")), "timeout: got inf; expected seconds, above 0 and up to"),
        ((here, 2, 0), "start: got a jax that has its devices already"),
    ):
        jax.devices()
        with pytest.raises(InputError, match=message):
            start(*arguments)
    given = {"KVJAX_COORDINATOR": here, "KVJAX_PROCESSES": "2"}
    assert not start_from_environment({"PATH": "/bin"})
    with pytest.raises(InputError, match="KVJAX_PROCESSES without KVJAX_PROCESS_ID"):
        start_from_environment(given)
    with pytest.raises(InputError, match="KVJAX_PROCESS_ID: got 'one'"):
        start_from_environment(given | {"KVJAX_PROCESS_ID": "one"})
    with pytest.raises(InputError, match="process_id: got 5 of 2"):
        start_from_environment(given | {"KVJAX_PROCESS_ID": "5"})


def test_fetch_of_one_process():
    found = fetch({"a": jax.numpy.arange(3), "b": np.ones(2)})
    assert isinstance(found["a"], np.ndarray)
    np.testing.assert_array_equal(found["a"], [0, 1, 2])
    key = jax.random.key(5)
    np.testing.assert_array_equal(fetch(key), jax.random.key_data(key))
