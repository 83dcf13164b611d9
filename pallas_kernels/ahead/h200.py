"""Compiling for an NVIDIA H200 by XLA's own pipeline, without the device.

XLA writes the PTX of every kernel and the launch plan into a folder; what is read there is what
would run. jax 0.10 does so; later versions compile as well, but write no PTX.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels.ahead import ptxas, sass
from pallas_kernels.ahead.lowering import quiet

# As text of XLA's GpuTargetConfig.
TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 62914560
  memory_bandwidth: 4800000000000
  device_memory_size: 150000000000
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
"""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel as compiled.

    Attributes:
      programs: of the launch. threads: of a program. shared: bytes of shared memory, of a program.
      listing: its machine code.
    """

    name: str
    used: ptxas.Used
    programs: int
    threads: int
    shared: int
    listing: str


@functools.cache
def mesh() -> jax.sharding.Mesh:
    """Of one H200 that is not there."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=TARGET, topology="1x1x1")
    return jax.sharding.Mesh(topology.devices, ("device",))


def placed(args: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes of arrays on the devices of a mesh."""
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere)
    return jax.tree.map(shape, args)


def compile_for_h200(
    f: Callable, args: Any, dump: Path, tools: tuple[str, str], name: str
) -> list[Kernel]:
    """The kernels of that name in `f(args)`; none where XLA wrote no PTX.

    Args:
      args: a pytree of shapes. dump: the folder of `--xla_dump_to`. tools: of `ptxas.find`.
    """
    before = set(dump.iterdir())
    with quiet(), jax.sharding.use_abstract_mesh(mesh().abstract_mesh):
        jax.jit(f).lower(placed(args, mesh())).compile()
    new = sorted(set(dump.iterdir()) - before)
    launches = "\n".join(p.read_text() for p in new if p.name.endswith("thunk_sequence.txt"))
    found = []
    for path in (p for p in new if p.suffix == ".ptx"):
        entry = ptxas.entry(path.read_text())
        if entry and entry[0].startswith(name):
            found.append(_kernel(path, *entry, launches, tools))
    for path in new:
        path.unlink()
    return found


def _kernel(path: Path, name: str, threads: int, launches: str, tools) -> Kernel:
    report, listing = ptxas.assemble(path, tools)
    used = ptxas.read(report)[name]
    programs, shared = launch(launches, name) or (0, used.static_shared)
    return Kernel(name, used, programs, threads, shared, sass.functions(listing)[name])


def launch(plan: str, name: str) -> tuple[int, int] | None:
    """Programs and bytes of shared memory of a kernel, from XLA's list of what it launches.

    Example:
      >>> launch("6: dot grid: [1, 8, 4] threads: [64, 1, 1] shared_memory: 16 bytes", "dot")
      (32, 16)
    """
    pattern = rf"\b{name} grid: \[(\d+), (\d+), (\d+)\].*?shared_memory: (\d+) bytes"
    m = re.search(pattern, plan)
    return (int(m[1]) * int(m[2]) * int(m[3]), int(m[4])) if m else None
