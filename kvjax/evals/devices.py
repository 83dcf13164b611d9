"""Kinds of devices, by the data sheets of their makers: memory, its bandwidth, and links."""

from __future__ import annotations

import dataclasses

from kvjax.core.errors import InputError, known


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of device. Bytes are counted in tens: a GB of a data sheet is 10^9.

    Attributes:
      kind: its name.
      memory: bytes. bandwidth: bytes per second from it.
      link: bytes per second that a device sends into a ring of its neighbours.
      domain: devices that such links join.
      network: bytes per second per device, where a ring leaves the domain.
    """

    kind: str
    memory: int
    bandwidth: float
    link: float
    domain: int
    network: float

    def speed(self, span: int, devices: int) -> float:
        """Bytes per second in the slowest of the rings that each lie within `span` of `devices`.

        Spans follow one another from device 0 on: where they do not divide a domain, one of them
        lies across its end.
        """
        inside = devices <= self.domain or self.domain % span == 0
        return self.link if inside else self.network


DEVICES: tuple[Device, ...] = (
    Device("h100", 80 * 10**9, 3.35e12, 450e9, 8, 50e9),
    Device("h200", 141 * 10**9, 4.8e12, 450e9, 8, 50e9),
    Device("a100-80", 80 * 10**9, 2.039e12, 300e9, 8, 25e9),
    Device("tpu-v5e", 16 * 10**9, 0.819e12, 100e9, 256, 3.125e9),
    Device("tpu-v5p", 95 * 10**9, 2.765e12, 200e9, 6144, 6.25e9),
    Device("tpu-v6e", 32 * 10**9, 1.638e12, 200e9, 256, 12.5e9),
)


def get_device(kind: str) -> Device:
    """The device of that kind.

        h100      NVIDIA data sheet, SXM5: 80 GB, 3.35 TB/s; NVLink 4, 900 GB/s both ways, so 450
                  each; DGX H100: 8 of them on NVSwitch, one 400 Gb/s port each
        h200      NVIDIA data sheet, SXM: 141 GB, 4.8 TB/s; links and ports as h100 (DGX H200)
        a100-80   NVIDIA data sheet, SXM4: 80 GB, 2039 GB/s; NVLink 3, 600 GB/s both ways, so 300
                  each; DGX A100: 8 of them, one 200 Gb/s port each
        tpu-v5e   Google Cloud, "TPU v5e": 16 GB, 819 GB/s; 400 GB/s both ways over 4 ports;
                  pods of 256, 6.4 Tb/s of network per pod
        tpu-v5p   Google Cloud, "TPU v5p": 95 GB, 2765 GB/s; 1200 GB/s both ways over 6 ports;
                  slices of up to 6144, 50 Gb/s of network per chip
        tpu-v6e   Google Cloud, "TPU v6e": 32 GB, 1638 GB/s; 800 GB/s both ways over 4 ports;
                  pods of 256, 25.6 Tb/s of network per pod

    A ring on a TPU uses the two ports of one dimension of the torus, one direction of each: half
    (v5e, v6e) or a third (v5p) of what the chip sends.

    Raises:
      InputError: an unknown kind; lists the known ones.

    Example:
      >>> get_device("h200").bandwidth
      4800000000000.0
    """
    kinds = {device.kind: device for device in DEVICES}
    if kind.lower() not in kinds:
        raise InputError(
            "device", got=repr(kind), expected=known(kinds), fix="use the nearest of these"
        )
    return kinds[kind.lower()]
