# SPDX-License-Identifier: Apache-2.0
"""The scores over HTTP, read only: /scores and /readyz, for any WSGI server.

/scores             what load_score.NodeScores says, as JSON
/readyz?model=M     200 as soon as MIN (0.9 by default) of model M is in the page cache, else 503;
        &min=MIN    M is a content identity or a name; without it, every model of the node counts
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from pagecache_bpf.placement.load_score import NodeScores

PATHS = ("/scores", "/readyz")
READY = 0.9
Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def answer(path: str, query: str, scores: NodeScores) -> tuple[str, dict[str, Any]]:
    """Answer a request.

    Args:
        path: one of PATHS.
        query: what follows the question mark.
        scores: of this node, now.

    Returns:
        Status line and the body, to be written as JSON.
    """
    if path == "/scores":
        return "200 OK", scores.as_json()
    asked = parse_qs(query)
    text = asked.get("min", [str(READY)])[0]
    try:
        least = float(text)
    except ValueError:
        least = -1.0
    if not 0 <= least <= 1:
        return "400 Bad Request", {"error": f"min={text[:40]}: it is not a number from 0 to 1"}
    wanted = asked.get("model", [])
    if wanted:
        found = {name: scores.find(name) for name in wanted}
    else:
        found = {model.model: model for model in scores.models}
    cached = {name: model.fraction if model else None for name, model in found.items()}
    ready = bool(cached) and all(value is not None and value >= least for value in cached.values())
    status = "200 OK" if ready else "503 Service Unavailable"
    return status, {"ready": ready, "min": least, "fractions": cached}


def beside(application: Any, scores: Callable[[], NodeScores]) -> Application:
    """Put the pages beside those of another WSGI application.

    Args:
        application: what answers every other path.
        scores: gives those of now.

    Returns:
        The application that answers both.
    """

    def serve(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path not in PATHS:
            return application(environ, start)  # type: ignore[no-any-return]
        if environ.get("REQUEST_METHOD") not in ("GET", "HEAD"):
            status, data = "405 Method Not Allowed", {"error": "there is only GET"}
        else:
            status, data = answer(path, environ.get("QUERY_STRING", ""), scores())
        body = json.dumps(data).encode()
        start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [] if environ.get("REQUEST_METHOD") == "HEAD" else [body]

    return serve
