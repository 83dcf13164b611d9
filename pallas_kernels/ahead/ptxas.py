"""Registers, spills and machine code of PTX, by the tools in the triton wheel."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ENTRY = re.compile(r"\.entry\s+(\w+)")
THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)")
USED = re.compile(
    r"Compiling entry function '(?P<name>\w+)'(?:(?!Compiling entry).)*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r"(?:(?!Compiling entry).)*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
FOLDER = "triton/backends/nvidia/bin"  # in the wheel


@dataclasses.dataclass(frozen=True)
class Used:
    """What a kernel takes, as `ptxas -v` reports it; bytes."""

    registers: int
    spill_stores: int
    spill_loads: int
    static_shared: int

    @property
    def spilled(self) -> int:
        """Bytes stored and loaded again for want of registers."""
        return self.spill_stores + self.spill_loads


def entry(ptx: str) -> tuple[str, int] | None:
    """Name and threads of the kernel in a PTX file, or None where there is none."""
    name, threads = ENTRY.search(ptx), THREADS.search(ptx)
    return (name[1], int(threads[1])) if name and threads else None


def read(report: str) -> dict[str, Used]:
    """Kernel -> what it uses, from the text of `ptxas -v`."""
    out = {}
    for m in USED.finditer(report):
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        used = Used(int(m["registers"]), int(m["stores"]), int(m["loads"]), 0)
        out[m["name"]] = dataclasses.replace(used, static_shared=int(shared[1]) if shared else 0)
    return out


def find(tools: Path) -> tuple[str, str] | str:
    """Paths of an assembler and a disassembler, or why there are none.

    Args:
      tools: folder into which the triton wheel was installed. Its newer `ptxas-blackwell` reads
        the PTX that XLA writes, its `ptxas` does not.
    """
    found = []
    for name, other in (("ptxas-blackwell", "ptxas"), ("nvdisasm", "nvdisasm")):
        own = tools / FOLDER / name
        path = str(own) if own.exists() else shutil.which(other)
        if path is None:
            return f"no {name} in {tools / FOLDER} and no {other} on the PATH"
        found.append(path)
    return found[0], found[1]


def assemble(ptx: Path, tools: tuple[str, str], arch: str = "sm_90a") -> tuple[str, str]:
    """The report of `ptxas -v` and the listing of `nvdisasm -c`.

    Raises:
      RuntimeError: when the assembler does not take the file.
    """
    assembler, disassembler = tools
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder) / "kernel.cubin")
        command = [assembler, "-v", f"-arch={arch}", str(ptx), "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True)
        report = done.stderr + done.stdout
        if done.returncode:
            raise RuntimeError(f"ptxas: {ptx.name}: {report.strip()[:300]}")
        command = [disassembler, "-c", cubin]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return report, listing
