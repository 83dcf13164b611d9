"""SIGKILL to real processes that save, read a prompt or generate: each restart goes on from what
counted last, says so, and all end bit for bit as if nothing had been killed."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvjax.checkpoint import peek

HERE = Path(__file__).parent
LONG = bool(os.environ.get("KVJAX_LONG_CHECKS"))
KILLS, JOBS = (10, ("save", "prefill", "generate")) if LONG else (3, ("save", "prefill"))


class Server:
    """Forks a process per job."""

    def __init__(self, home: Path):
        words = {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(HERE.parents[1]),
            "JAX_COMPILATION_CACHE_DIR": str(home),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "kill_server.py")],
            env=os.environ | words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, job: str, folder: Path, kill_at: tuple[int, float] | None = None) -> list[str]:
        """What the job said, and its status. `kill_at`: the save that it is killed in, and how many
        seconds later."""
        self.process.stdin.write(f"{job} {folder}\n")
        self.process.stdin.flush()
        lines: list[str] = []
        pid, saves = 0, 0
        while not (lines and lines[-1].startswith("ended")):
            line = self.process.stdout.readline().rstrip("\n")
            assert line, "the server has ended"
            lines.append(line)
            pid = int(line.split()[1]) if line.startswith("pid") else pid
            saves += line.startswith("saving")
            if kill_at is not None and pid and saves >= kill_at[0]:
                time.sleep(kill_at[1])
                os.kill(pid, signal.SIGKILL)
                kill_at = None
        return lines

    def close(self):
        self.process.stdin.close()
        self.process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("fcntl")  # where there is fork
    found = Server(tmp_path_factory.mktemp("compiled"))
    yield found
    found.close()


def numbers(lines, word):
    return [int(line.split()[1]) for line in lines if line.startswith(word)]


def result(lines):
    (line,) = [line for line in lines if line.startswith("result")]
    return line


def read_and_made(line):
    """Tokens in "resumed: 48 of 472 tokens read, 2 of 40 made, from FOLDER"."""
    words = line.replace(",", "").split()
    return int(words[0]) + (int(words[5]) if "made" in words else 0)


@pytest.mark.parametrize("job", JOBS)
def test_killed_at_any_time(job, server, tmp_path):
    draw = random.Random(f"kills {job}")
    want = server.run(job, tmp_path / "whole")
    assert want[-1] == "ended 0", want
    told, landed, folder = [], set(), tmp_path / "killed"
    for n in range(KILLS):
        save = draw.randint(2, 3) if n == 0 else draw.randint(1, 2)
        lines = server.run(job, folder, (save, draw.uniform(0, 0.1)))
        assert lines[-1] == "ended -9", lines
        told.append(lines)
    told.append(server.run(job, folder))
    assert told[-1][-1] == "ended 0", told[-1]
    assert result(told[-1]) == result(want)
    for before, after in itertools.pairwise(told):
        counted = max(numbers(before, "counts"))
        begun = numbers(before, "saving")[-1]
        resumed = [line for line in after if line.startswith("resumed")]
        if not resumed:
            assert counted == -1
            continue
        (line,) = resumed
        found = int(line.split()[1]) if job == "save" else read_and_made(line.split(":")[1])
        assert found in (counted, begun)  # all that counted, or what was just being saved
        landed.add(found == begun)
        if job != "save":
            folder_of_it = Path(line.split()[-1])
            assert folder_of_it.parent == folder
    assert sum("resumed" in line for lines in told for line in lines) == KILLS
    left = [path for path in folder.iterdir() if path.is_dir()]
    assert len(left) == 2  # what kills have left behind is gone
    assert peek(folder)[0] in left
