# SPDX-License-Identifier: Apache-2.0
"""What the machine is made of: NUMA nodes, accelerators, and where a named device is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

NVIDIA, AMD, ASCEND, INTEL = "nvidia", "amd", "ascend", "intel"


@dataclass(frozen=True)
class Node:
    """A NUMA node.

    cpus: its CPUs, none for memory that no CPU is next to (an accelerator's, CXL).
    memory_bytes: None if the kernel does not tell.  distances: to each node, in the order of
    the nodes.  accelerator: PCI address of the accelerator whose own memory this is.
    """

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int | None = None
    distances: tuple[int, ...] = ()
    accelerator: str | None = None


@dataclass(frozen=True)
class Mig:
    """A MIG instance of an NVIDIA GPU: its UUID, GPU instance and compute instance."""

    uuid: str
    gpu_instance: int | None = None
    compute_instance: int | None = None


@dataclass(frozen=True)
class Accelerator:
    """One accelerator.

    index: its place in the vendor's own numbering before any *_VISIBLE_DEVICES; None where the
    kernel does not tell that numbering.  node: the NUMA node of the host memory next to it, None
    if unknown.  memory_node: the node that its own memory is, on machines where the kernel
    manages it (GH200, GB200).  unified: host and device share one address space in hardware, so
    that what is in the page cache need not be copied to be used.
    """

    vendor: str
    pci: str
    index: int | None = None
    uuid: str | None = None
    model: str | None = None
    node: int | None = None
    memory_node: int | None = None
    unified: bool = False
    device_id: int | None = None
    migs: tuple[Mig, ...] = ()


@dataclass(frozen=True)
class Placement:
    """Where a device that was asked for by name is.

    node: where its pages should be, None if unknown; why says what is not known.
    """

    name: str
    accelerator: Accelerator | None
    node: int | None
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the placement as reports show it.

        Returns:
            Keys and values for JSON.
        """
        found = self.accelerator
        return {
            "name": self.name,
            "pci": found.pci if found else None,
            "node": self.node,
            "unified": bool(found and found.unified),
            "why": self.why,
        }


@dataclass(frozen=True)
class Topology:
    """The machine.  sources: where the accelerators are known from."""

    nodes: tuple[Node, ...]
    accelerators: tuple[Accelerator, ...]
    sources: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def unified(self) -> bool:
        """Whether an accelerator shares its memory with the host."""
        return any(accelerator.unified for accelerator in self.accelerators)

    def node(self, number: int) -> Node | None:
        """Return the node of a number.

        Args:
            number: the kernel's.

        Returns:
            The node, None if there is none.
        """
        return next((node for node in self.nodes if node.id == number), None)

    def cpus_of(self, node: int | None) -> tuple[int, ...]:
        """Return the CPUs next to a node: its own, else those of the nearest node that has some.

        Args:
            node: the node's number, None if it is unknown.

        Returns:
            The CPUs' numbers; none for an unknown node, so that whoever would bind to it leaves it.
        """
        here = self.node(node) if node is not None else None
        if here is None or here.cpus:
            return here.cpus if here else ()
        near = sorted(zip(here.distances, self.nodes, strict=False), key=lambda pair: pair[0])
        return next((node.cpus for _, node in near if node.cpus), ())

    def by_pci(self, address: str) -> Accelerator | None:
        """Return the accelerator at a PCI address.

        Args:
            address: in any notation.

        Returns:
            The accelerator, None if there is none.
        """
        wanted = pci_address(address)
        return next(
            (accelerator for accelerator in self.accelerators if accelerator.pci == wanted), None
        )

    def of_vendor(self, vendor: str) -> tuple[Accelerator, ...]:
        """Return the accelerators of one vendor.

        Args:
            vendor: "nvidia", "amd", "intel" or "huawei".

        Returns:
            The accelerators, in the vendor's own order where that is known.
        """
        return tuple(
            accelerator for accelerator in self.accelerators if accelerator.vendor == vendor
        )

    def as_json(self) -> dict[str, Any]:
        """Return the machine as `pagecache-bpf topology --json` prints it.

        Returns:
            Keys and values for JSON.
        """
        return {
            "nodes": [{**asdict(node)} for node in self.nodes],
            "accelerators": [
                {
                    key: value
                    for key, value in asdict(accelerator).items()
                    if key not in ("device_id",)
                }
                for accelerator in self.accelerators
            ],
            "unified": self.unified,
            "sources": list(self.sources),
            "notes": list(self.notes),
        }


def pci_address(text: str) -> str | None:
    """Return a PCI address in the kernel's notation, 0000:65:00.0.

    NVML writes eight digits of domain; people leave the domain and the function out.

    Args:
        text: the address, in any usual notation.

    Returns:
        The address, None if the text is none.
    """
    rest, _, function = text.strip().lower().partition(".")
    parts = rest.split(":")
    if not 2 <= len(parts) <= 3:
        return None
    domain, bus, slot = ["0", *parts][-3:]
    if [len(bus), len(slot)] != [2, 2] or not 1 <= len(domain) <= 8:
        return None
    try:
        numbers = [int(part, 16) for part in (domain, bus, slot, function or "0")]
    except ValueError:
        return None
    if numbers[2] > 0x1F or numbers[3] > 7:
        return None
    return "{:04x}:{:02x}:{:02x}.{:x}".format(*numbers)


def parse_cpulist(text: str) -> tuple[int, ...]:
    """Return the CPUs of a list as the kernel writes it.

    Args:
        text: such as "0-3,8".

    Returns:
        The numbers, ascending as written; what makes no sense is left out.
    """
    cpus: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            cpus += range(int(first), int(last or first) + 1)
    return tuple(cpus)
