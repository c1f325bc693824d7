# SPDX-License-Identifier: Apache-2.0
"""What the vendors' libraries tell: NVML if it can be imported, torch if the process uses it.

Neither is loaded into a server that does not have it: NVML only where an NVIDIA driver is,
torch never.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from pagecache_bpf.topology.types import Accelerator, Mig, pci_address

_log = logging.getLogger(__name__)


def load_nvml() -> Any | None:
    """Import NVIDIA's management library.

    Returns:
        The module pynvml (package nvidia-ml-py), None where it is not installed.
    """
    try:
        return import_module("pynvml")
    except Exception as error:  # somebody else's module may fail in any way
        _log.debug("pynvml: %s", error)
        return None


def ask_nvml(nvml: Any, gpus: Sequence[Accelerator]) -> list[Accelerator] | None:
    """Add NVML's UUIDs, names and MIG instances to GPUs.

    Args:
        nvml: the module pynvml.
        gpus: the GPUs that sysfs shows.

    Returns:
        The same GPUs with what NVML says of them; None if it does not answer.
    """
    try:
        nvml.nvmlInit()
    except Exception as error:
        _log.debug("nvml: %s", error)
        return None
    told: dict[str, Accelerator] = {}
    try:
        by_pci = {gpu.pci: gpu for gpu in gpus}
        for number in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(number)
            pci = pci_address(_text(nvml.nvmlDeviceGetPciInfo(handle).busId))
            if pci in by_pci:
                told[pci] = replace(
                    by_pci[pci],
                    uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
                    model=_text(nvml.nvmlDeviceGetName(handle)),
                    migs=tuple(_migs(nvml, handle)),
                )
    except Exception as error:  # a GPU that has fallen off the bus, an old driver
        _log.debug("nvml: %s", error)
    finally:
        nvml.nvmlShutdown()
    return [told.get(gpu.pci, gpu) for gpu in gpus]


def _migs(nvml: Any, handle: Any) -> list[Mig]:
    found = []
    try:
        if not nvml.nvmlDeviceGetMigMode(handle)[0]:
            return []
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)
    except Exception:  # no MIG on this GPU
        return []
    for number in range(count):
        try:
            mig = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
            found.append(
                Mig(
                    _text(nvml.nvmlDeviceGetUUID(mig)),
                    int(nvml.nvmlDeviceGetGpuInstanceId(mig)),
                    int(nvml.nvmlDeviceGetComputeInstanceId(mig)),
                )
            )
        except Exception:  # numbers are not used up in order
            continue
    return found


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def torch_addresses() -> list[str] | None:
    """Return the PCI addresses of torch's cuda:0, cuda:1 and so on.

    Nothing is initialized on the process's behalf: that would take memory on every GPU and break
    servers that fork.

    Returns:
        The addresses; None unless this process uses CUDA already.
    """
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            return None
        found = []
        for number in range(torch.cuda.device_count()):
            known = torch.cuda.get_device_properties(number)
            bus, slot = known.pci_bus_id, known.pci_device_id
            found.append(f"{known.pci_domain_id:04x}:{bus:02x}:{slot:02x}.0")
        return found
    except Exception as error:  # an older torch tells no addresses
        _log.debug("torch: %s", error)
        return None
