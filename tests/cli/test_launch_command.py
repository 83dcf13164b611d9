"""`kvjax launch`: what each process is told, and how a run ends when one of them dies."""

import argparse
import os
import queue
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
from memory_model import fails

from kvjax.cli import launch
from kvjax.cli.main import main
from kvjax.cli.workers import GRACE, _cause

ID = "import os, sys, time; i = int(os.environ['KVJAX_PROCESS_ID']);"
RUN = [sys.executable, "-c"]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_commands_are_printed(capsys):
    more = ["--coordinator", "10.0.0.1:1234", "--local-devices", "2", "--timeout", "5"]
    assert main(["launch", "--processes", "2", *more, "--print", "--", "python", "a b.py"]) == 0
    shared = "KVJAX_COORDINATOR=10.0.0.1:1234 KVJAX_PROCESSES=2 KVJAX_TIMEOUT=5"
    assert capsys.readouterr().out.splitlines() == [
        f"{shared} KVJAX_PROCESS_ID={n} KVJAX_LOCAL_DEVICES=2 python 'a b.py'" for n in (0, 1)
    ]


def test_every_process_has_its_environment(capfd):
    names = "COORDINATOR PROCESSES PROCESS_ID LOCAL_DEVICES"
    show = f"import os; print(*(os.environ['KVJAX_' + n] for n in '{names}'.split()), 'héé')"
    assert main(["launch", "--processes", "3", "--", *RUN, show]) == 0
    lines = sorted(capfd.readouterr().out.splitlines())
    pattern = r"\[(\d)\] 127\.0\.0\.1:(\d+) 3 (\d) 1 héé"
    found = [m.groups() for line in lines if (m := re.fullmatch(pattern, line))]
    assert [(mark, own) for mark, _, own in found] == [(n, n) for n in "012"]
    assert len({port for _, port, _ in found}) == 1  # one coordinator for all


@pytest.mark.parametrize(
    ("dies", "told"),
    [
        ("print('so sad'); sys.exit(3)", "exit code 3 and the last line 'so sad'"),
        ("os.kill(os.getpid(), 9)", r"exit code -9 \(SIGKILL\) and no line"),
    ],
)
def test_one_that_dies_ends_the_others(dies, told, tmp_path, capsys):
    stays = f"open(r'{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(60)"
    waits = f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists(r'{tmp_path}/pid'), True)]"
    script = f"{ID}\nif i == 1:\n {waits}; {dies}\n{stays}"
    before = time.monotonic()
    line = fails(main, capsys, "launch", "--processes", 2, "--", *RUN, script)
    assert time.monotonic() - before < 30
    assert re.search(rf"process 1 of 2: got {told}; .*the others have been ended", line)
    pid = (tmp_path / "pid").read_text()
    assert not pid or not _alive(int(pid))


def test_one_that_does_not_want_to_end_is_ended(tmp_path, capsys):
    deaf = (
        f"import signal; signal.signal(15, signal.SIG_IGN); open(r'{tmp_path}/pid', 'w').write("
        "str(os.getpid())); time.sleep(60)"
    )
    waits = f"[time.sleep(0.01) for _ in iter(lambda: os.path.exists(r'{tmp_path}/pid'), True)]"
    script = f"{ID}\nif i == 0:\n {waits}; sys.exit('bad')\n{deaf}"
    before = time.monotonic()
    line = fails(main, capsys, "launch", "--processes", 2, "--", *RUN, script)
    assert GRACE < time.monotonic() - before < GRACE + 27
    assert "process 0 of 2: got exit code 1 and the last line 'bad'" in line
    pid = (tmp_path / "pid").read_text()
    assert not pid or not _alive(int(pid))


@pytest.mark.parametrize(
    ("codes", "cause"), [([1, -6, -9, 0], 2), ([1, -6], 0), ([-6, 1], 0), ([-11, -9], 0), ([3], 0)]
)
def test_the_cause_is_told_and_not_its_consequence(codes, cause):
    dead: list[Any] = [SimpleNamespace(process=SimpleNamespace(returncode=code)) for code in codes]
    ended: queue.Queue[Any] = queue.Queue()
    for worker in dead[1:]:
        ended.put(worker)
    assert _cause(dead[0], ended) is dead[cause]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all(number):
    script = f"{ID} print(os.getpid(), flush=True); time.sleep(60)"
    words = [sys.executable, "-m", "kvjax.cli.main", "launch", "--processes", "2", "--"]
    # Where these tests run under nohup a child would be born deaf to SIGHUP.
    heard = lambda: signal.signal(number, signal.SIG_DFL)
    with subprocess.Popen(
        [*words, *RUN, script], stdout=subprocess.PIPE, text=True, preexec_fn=heard
    ) as run:
        assert run.stdout is not None
        pids = [int(run.stdout.readline().split()[1]) for _ in range(2)]
        run.send_signal(number)
        assert run.wait(30) == 128 + number
    assert not any(map(_alive, pids))


def test_a_reader_that_goes_ends_all():
    """As in `kvjax launch ... | head -1`: more is printed than a pipe holds."""
    script = f"{ID} print(os.getpid(), flush=True)\nwhile True: print('x' * 1000)"
    words = [sys.executable, "-m", "kvjax.cli.main", "launch", "--processes", "1", "--"]
    with subprocess.Popen([*words, *RUN, script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline().split()[1])
        run.stdout.close()
        assert run.wait(30) == 0  # as with any command of kvjax
    assert not _alive(pid)


def test_mistakes_are_told(capsys):
    say = lambda *argv: fails(main, capsys, "launch", *argv)
    assert "command: got none" in say("--processes", 2)
    assert "--processes: got 0" in say("--processes", 0, "--", "true")
    assert "--local-devices: got 0" in say("--processes", 1, "--local-devices", 0, "--", "true")
    assert "--timeout: got -1.0" in say("--processes", 1, "--timeout", -1, "--", "true")
    assert "--timeout: got inf" in say("--processes", 1, "--timeout", "inf", "--", "true")
    assert "coordinator: got 'here'" in say("--processes", 1, "--coordinator", "here", "--", "true")
    assert "got no-such-program (No such file" in say("--processes", 2, "--", "no-such-program")


def test_gpus_are_dealt_out(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")
    deal = lambda count, each, **more: launch.environments(
        argparse.Namespace(
            processes=count,
            local_devices=each,
            coordinator=more.get("coordinator"),
            timeout=None,
            show=bool(more),
        )
    )
    assert [e["CUDA_VISIBLE_DEVICES"] for e in deal(2, None)] == ["4,5", "6,7"]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in deal(3, 1)] == ["4", "5", "6"]
    assert {e["KVJAX_LOCAL_DEVICES"] for e in deal(2, None)} == {"2"}
    with pytest.raises(launch.InputError, match="3 with 2 devices each; expected at most the 5 GP"):
        deal(3, 2)
    with pytest.raises(launch.InputError, match="6 with 1 devices each"):
        deal(6, None)
    assert "CUDA_VISIBLE_DEVICES" not in deal(6, 2, coordinator="10.0.0.1:1234")[5]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert deal(6, None)[5]["KVJAX_LOCAL_DEVICES"] == "1"


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (ProcessLookupError, FileNotFoundError):
        return False
