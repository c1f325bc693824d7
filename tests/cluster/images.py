# SPDX-License-Identifier: Apache-2.0
"""The one image that is not ours: what keeps a pod's namespaces, which does nothing at all."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

PAUSE = "localhost/pause:test"
_SOURCE = "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n"


def pause(place: Path) -> Path:
    """Make the image; returns its archive, of the kind that `docker save` makes."""
    program = place / "pause"
    command = ["gcc", "-O2", "-static", "-x", "c", "-", "-o", str(program)]
    subprocess.run(command, input=_SOURCE, text=True, check=True)
    layer = _tar({"pause": program.read_bytes()}, 0o755)
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"], "User": "65534"},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [PAUSE], "Layers": ["layer.tar"]}]
    parts = {
        "config.json": json.dumps(config).encode(),
        "layer.tar": layer,
        "manifest.json": json.dumps(manifest).encode(),
    }
    archive = place / "pause.tar"
    archive.write_bytes(_tar(parts, 0o644))
    return archive


def _tar(files: dict[str, bytes], mode: int) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            archive.addfile(entry, io.BytesIO(data))
    return made.getvalue()
