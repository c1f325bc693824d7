# SPDX-License-Identifier: Apache-2.0
"""The few calls of the Kubernetes API that we need, with the standard library.

In a pod, the address, the token and the authority are where Kubernetes puts them; the token is read
anew for each request, as it is replaced every hour.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pagecache_bpf.errors import PagecacheError, PrivilegeError, UnsupportedError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
#: Names and labels only: a list of 1,000 nodes is 1 MB and not 20.
_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
_MOST = 64 << 20
_PAGE = 500


@dataclass(frozen=True)
class KubernetesApi:
    """An API server; url without a path, token and authority as files (None: none)."""

    url: str
    token: Path | None = None
    authority: Path | None = None
    seconds: float = 10.0

    @classmethod
    def of_pod(cls) -> KubernetesApi:
        """Return that of the cluster that this process runs in.

        Returns:
            The API server that the environment names, with the pod's token and its authority.

        Raises:
            UnsupportedError: it does not run in a pod with a service account.
        """
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{part}") for part in ("HOST", "PORT"))
        token = ACCOUNT / "token"
        if not host or not token.is_file():
            raise UnsupportedError(
                "there is no Kubernetes API to talk to",
                "this is no pod, or one without the token of a service account",
                "Set automountServiceAccountToken, or give --api",
            )
        name = f"[{host}]" if ":" in host else host
        return cls(f"https://{name}:{port or 443}", token, ACCOUNT / "ca.crt")

    def get(self, path: str, *, metadata: bool = False) -> Any:
        """Read an object.

        Args:
            path: with the query, from /api on.
            metadata: of a list, the metadata of its objects only.

        Returns:
            The object, as json decodes it.

        Raises:
            PrivilegeError: the service account may not.
            PagecacheError: it failed otherwise.
        """
        return self._ask("GET", path, accept=_METADATA if metadata else "application/json")

    def items(self, path: str, *, metadata: bool = False) -> Iterator[dict[str, Any]]:
        """Read a list, page by page.

        Args:
            path: as for get(), without limit and continue.
            metadata: as for get().

        Yields:
            The objects of the list; the next page is asked for when it is needed.

        Raises:
            PagecacheError: as get().
        """
        mark = "&" if "?" in path else "?"
        more = ""
        while True:
            found = self.get(f"{path}{mark}limit={_PAGE}{more}", metadata=metadata)
            yield from found.get("items") or ()
            token = (found.get("metadata") or {}).get("continue")
            if not token:
                return
            more = f"&continue={quote(token)}"

    def patch(self, path: str, body: Any, kind: str = MERGE_PATCH) -> Any:
        """Change an object.

        Args:
            path: from /api on.
            body: the patch.
            kind: MERGE_PATCH or JSON_PATCH.

        Returns:
            The object as it is now.

        Raises:
            PrivilegeError: the service account may not.
            PagecacheError: it failed otherwise.
        """
        return self._ask("PATCH", path, json.dumps(body).encode(), kind)

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        kind: str = "",
        accept: str = "application/json",
    ) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", data=body, method=method)
        request.add_header("Accept", accept)
        if kind:
            request.add_header("Content-Type", kind)
        what = f"{method} {path.partition('?')[0]} failed"
        try:
            if self.token is not None:
                request.add_header("Authorization", f"Bearer {self.token.read_text().strip()}")
            context = None
            if self.url.startswith("https"):
                context = ssl.create_default_context(cafile=self.authority)
            with urllib.request.urlopen(request, timeout=self.seconds, context=context) as answer:
                return json.loads(answer.read(_MOST))
        except urllib.error.HTTPError as error:
            with error:
                why = f"{error.code} {error.reason}: {_message(error.read(1 << 16))}"
            if error.code in (401, 403):
                fix = "Give the service account the role of packaging/kubernetes/placement.yaml"
                raise PrivilegeError(what, why, fix) from error
            raise PagecacheError(what, why) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise PagecacheError(what, f"{self.url}: {error}") from error


def _message(body: bytes) -> str:
    """Return the sentence in a Status object."""
    try:
        return str(json.loads(body)["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return body[:300].decode(errors="replace")
