# SPDX-License-Identifier: Apache-2.0
"""Answers names of services, in CoreDNS' place: A records of NAME.NAMESPACE.svc[.cluster.local]."""

from __future__ import annotations

import re
import socket
import struct
import threading

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.placement.kubernetes_api import KubernetesApi

_NAME = re.compile(r"([a-z0-9-]+)\.([a-z0-9-]+)\.svc(\.cluster\.local)?\.?", re.I)


class NameServer:
    """A name server on port 53 of an address, until close()."""

    def __init__(self, address: str, api: KubernetesApi) -> None:
        """Serve; what names mean is asked of the API server."""
        self._api = api
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                asked, peer = self._socket.recvfrom(4096)
            except OSError:
                return
            try:
                self._socket.sendto(self._answer(asked), peer)
            except (OSError, IndexError, struct.error):
                continue

    def _answer(self, asked: bytes) -> bytes:
        labels, at = [], 12
        while asked[at]:
            labels.append(asked[at + 1 : at + 1 + asked[at]].decode("ascii", "replace"))
            at += 1 + asked[at]
        (kind,) = struct.unpack_from(">H", asked, at + 1)
        found = self._addresses(".".join(labels))
        answers = [
            b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 1, 4) + socket.inet_aton(address)
            for address in (found or [])
            if kind == 1
        ]
        flags = 0x8580 if found is not None else 0x8583
        head = asked[:2] + struct.pack(">HHHHH", flags, 1, len(answers), 0, 0)
        return head + asked[12 : at + 5] + b"".join(answers)

    def _addresses(self, name: str) -> list[str] | None:
        """Return the addresses of a service; None: there is no such name."""
        match = _NAME.fullmatch(name)
        if not match:
            return None
        try:
            path = f"/api/v1/namespaces/{match[2]}"
            service = self._api.get(f"{path}/services/{match[1]}")
            if service["spec"].get("clusterIP") not in (None, "", "None"):
                return [service["spec"]["clusterIP"]]
            endpoints = self._api.get(f"{path}/endpoints/{match[1]}")
        except PagecacheError:
            return None
        subsets = endpoints.get("subsets") or []
        return [address["ip"] for subset in subsets for address in subset.get("addresses") or []]
