# SPDX-License-Identifier: Apache-2.0
"""What a process sees of the accelerators: the vendors' *_VISIBLE_DEVICES, as they define them.

Sources: CUDA Programming Guide, "Environment Variables" (CUDA_VISIBLE_DEVICES: what comes after
an invalid entry is not seen; UUIDs may be cut; MIG-...), ROCm "GPU isolation techniques"
(ROCR_VISIBLE_DEVICES by number or UUID, then HIP_VISIBLE_DEVICES by number among those), CANN
"ASCEND_RT_VISIBLE_DEVICES" (decimal numbers and commas only).  That a device named twice makes
CUDA see none is what its runtime does; PyTorch counts devices by the same rule
(torch/cuda/__init__.py, _parse_visible_devices).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pagecache_bpf.topology.types import AMD, ASCEND, INTEL, NVIDIA, Accelerator

#: Variables that narrow what is seen, by vendor, in the order they are applied.
VARIABLES = {
    NVIDIA: ("CUDA_VISIBLE_DEVICES",),
    AMD: ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"),
    ASCEND: ("ASCEND_RT_VISIBLE_DEVICES",),
    INTEL: (),
}


class Unknown(Exception):
    """What is seen cannot be told from here; the text says why."""


def visible(
    vendor: str, devices: Sequence[Accelerator], environ: Mapping[str, str]
) -> list[Accelerator]:
    """Return the devices of one vendor that a process with some environment sees.

    Args:
        vendor: as Topology.of_vendor() takes it.
        devices: the vendor's devices, in its own order.
        environ: the environment of the process.

    Returns:
        The devices, in the order in which the process numbers them.

    Raises:
        Unknown: an entry may be right and cannot be looked up, as a MIG instance without NVML or a
            UUID that the driver does not tell.
    """
    if vendor == NVIDIA:
        return _cuda(devices, environ.get("CUDA_VISIBLE_DEVICES"))
    if vendor == AMD:
        seen = _rocr(devices, environ.get("ROCR_VISIBLE_DEVICES"))
        # HIP takes CUDA's variable too where its own is not set.
        narrower = environ.get("HIP_VISIBLE_DEVICES", environ.get("CUDA_VISIBLE_DEVICES"))
        return _by_number(seen, narrower)
    if vendor == ASCEND:
        return _ascend(devices, environ.get("ASCEND_RT_VISIBLE_DEVICES"))
    return list(devices)


def _cuda(devices: Sequence[Accelerator], value: str | None) -> list[Accelerator]:
    if value is None:
        return list(devices)
    if value.strip().startswith(("GPU-", "MIG-")):
        return _by_uuid(devices, value)
    return _by_number(devices, value)


def _by_number(devices: Sequence[Accelerator], value: str | None) -> list[Accelerator]:
    """Ordinals: the number that an entry starts with, as strtol() reads it."""
    if value is None:
        return list(devices)
    seen: list[int] = []
    for entry in value.split(","):
        number = re.match(r"\s*([+-]?\d+)", entry)
        if number is None or not 0 <= int(number[1]) < len(devices):
            break
        if int(number[1]) in seen:
            return []
        seen.append(int(number[1]))
    return [devices[number] for number in seen]


def _by_uuid(devices: Sequence[Accelerator], value: str) -> list[Accelerator]:
    """UUIDs of GPUs or of MIG instances; the first entry says which of the two."""
    entries = [entry.strip() for entry in value.split(",")]
    kind = entries[0][:4]
    seen: list[Accelerator] = []
    for place, entry in enumerate(entries):
        if not entry.startswith(kind):
            break
        if entry in entries[:place]:
            return []
        found = by_uuid(devices, entry)
        if found is None:
            break
        if kind == "GPU-" and found in seen:
            return []
        seen.append(found)
    return seen


def by_uuid(devices: Sequence[Accelerator], text: str) -> Accelerator | None:
    """Return the device of a UUID, of the beginning of one, or of a MIG instance.

    MIG-GPU-<UUID>/<GPU instance>/<compute instance> is how drivers before R470 wrote it.

    Args:
        devices: the devices to look among.
        text: the UUID or its beginning.

    Returns:
        The device, None if there is none.

    Raises:
        Unknown: it cannot be told.
    """
    if text.startswith("MIG-GPU-"):
        return by_uuid(devices, text[len("MIG-") :].partition("/")[0])
    if text.startswith("MIG-"):
        instances = {mig.uuid.lower(): device for device in devices for mig in device.migs}
        matching = [device for uuid, device in instances.items() if uuid.startswith(text.lower())]
        if not instances:
            raise Unknown(f"which GPU {text} is part of only NVML knows (package nvidia-ml-py)")
    else:
        if not any(device.uuid for device in devices):
            raise Unknown("the driver does not tell the UUIDs of its devices")
        matching = [
            device
            for device in devices
            if device.uuid and device.uuid.lower().startswith(text.lower())
        ]
    return matching[0] if len(matching) == 1 else None


def _rocr(devices: Sequence[Accelerator], value: str | None) -> list[Accelerator]:
    """Numbers and UUIDs, mixed; the list ends at what is neither, and at a repetition."""
    if value is None:
        return list(devices)
    seen: list[Accelerator] = []
    for entry in (part.strip() for part in value.split(",")):
        if re.fullmatch(r"\d+", entry):
            found = devices[int(entry)] if int(entry) < len(devices) else None
        elif entry.upper().startswith("GPU-"):
            found = by_uuid(devices, entry)
        else:
            found = None
        if found is None or found in seen:
            break
        seen.append(found)
    return seen


def _ascend(devices: Sequence[Accelerator], value: str | None) -> list[Accelerator]:
    """Numbers in rising order; the list ends at the first other character or bad number."""
    if value is None:
        return list(devices)
    allowed = re.match(r"(?:\d+(?:,|$))*\d*", value)
    numbers: list[int] = []
    for entry in (allowed[0] if allowed else "").split(","):
        if not entry or int(entry) >= len(devices):
            break
        if numbers and int(entry) <= numbers[-1]:
            break
        numbers.append(int(entry))
    return [devices[number] for number in numbers]
