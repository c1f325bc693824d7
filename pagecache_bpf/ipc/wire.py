# SPDX-License-Identifier: Apache-2.0
"""Framing and errors of both sockets of the controller.

A request is one line of JSON, `{"v": 1, "op": NAME, ...}`; so is the answer, `{"v": 1, "ok":
{...}}` or `{"v": 1, "error": {"class", "what", "why", "fix", "docs"}}`.  Nothing that comes from
the other side is believed: an error is raised only in a class of pagecache_bpf.errors, and what
is no message becomes an error itself.  Importing this costs no more than json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pagecache_bpf import errors
from pagecache_bpf.errors import PagecacheError, UsageError

#: Version of the protocol: of the framing and of the operations of the public socket.
VERSION = 1
#: Requests of one batch, each of which may come with a file: the kernel takes 253 at once.
BATCH_REQUESTS = 128

_FIELDS = ("what", "why", "fix", "docs")


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message as the line that carries it.

    Args:
        message: members of the JSON object; the version is added.

    Returns:
        The line, its newline included.
    """
    return json.dumps({"v": VERSION, **message}, separators=(",", ":")).encode() + b"\n"


def encode_answer(answer: Mapping[str, Any]) -> bytes:
    """Make the line that answers a request which went well.

    Args:
        answer: members of the answer, of what the json module can write.

    Returns:
        The line, its newline included.
    """
    return encode({"ok": answer})


def encode_error(error: PagecacheError) -> bytes:
    """Make the line that tells an error.

    Args:
        error: the error; its class, texts and documentation go over the wire.

    Returns:
        The line, its newline included.
    """
    return encode({"error": error_fields(error)})


def error_fields(error: PagecacheError) -> dict[str, str]:
    """Return an error as members of a JSON object.

    Args:
        error: any error of this package.

    Returns:
        The name of its class and its texts; told_error() makes the error of them again.
    """
    fields = {name: str(getattr(error, name) or "") for name in _FIELDS}
    return {"class": type(error).__name__, **fields}


def decode_request(line: bytes) -> tuple[str, dict[str, Any]]:
    """Read a request.

    Args:
        line: without its newline.

    Returns:
        The name of the operation and its other members; neither has been compared with what the
        operation takes.

    Raises:
        UsageError: the line is no request of this version.
    """
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise refused("it is not JSON", str(error)) from None
    if not isinstance(request, dict):
        raise refused("it is not an object", type(request).__name__)
    if request.pop("v", None) != VERSION:
        raise UsageError(
            "the request was refused",
            f"this controller speaks version {VERSION} of the protocol only",
            "Use the pagecache-bpf that the controller is from",
        )
    name = request.pop("op", None)
    if not isinstance(name, str):
        raise refused("there is no such operation", shortened(name))
    return name, request


def decode_answer(line: bytes) -> dict[str, Any]:
    """Read an answer.

    Args:
        line: without its newline.

    Returns:
        What the operation has answered.

    Raises:
        PagecacheError: the error that the other side tells, in its class.
        ValueError: the line is no answer.
    """
    return result_of(json.loads(line))


def result_of(answer: object) -> dict[str, Any]:
    """Take the result out of an answer.

    Args:
        answer: {"ok": members} or {"error": error_fields()}.

    Returns:
        What the operation has answered.

    Raises:
        PagecacheError: the error that the other side tells, in its class.
        ValueError: it is no answer.
    """
    if not isinstance(answer, dict):
        raise ValueError("its answer is no object")
    if "error" in answer:
        raise told_error(answer["error"])
    found = answer.get("ok")
    if not isinstance(found, dict):
        raise ValueError("its answer is neither a result nor an error")
    return found


def refused(why: str, detail: str = "") -> UsageError:
    """Make the error for a request that is wrong in itself.

    Args:
        why: what is wrong with it.
        detail: the value that is wrong; "" for none.

    Returns:
        The error, to be raised.
    """
    return UsageError("the request was refused", f"{why}: {detail}" if detail else why)


def shortened(value: object) -> str:
    """Show a value that a stranger has sent, for a message.

    Args:
        value: any value.

    Returns:
        Its repr(), cut to 80 characters.
    """
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def told_error(fields: object, most: int | None = None) -> PagecacheError:
    """Make the error that another process tells, of a class of pagecache_bpf.errors and of texts.

    Args:
        fields: what error_fields() returned over there, or anything else that was sent.
        most: characters that are taken of each text; None: all.

    Returns:
        The error, to be raised; a PagecacheError if its class is none of ours.

    Raises:
        ValueError: it is no object.
    """
    if not isinstance(fields, dict):
        raise ValueError("its error is no object")
    kind = getattr(errors, str(fields.get("class", "")), None)
    if not (isinstance(kind, type) and issubclass(kind, PagecacheError)):
        kind = PagecacheError
    texts = {name: str(fields.get(name) or "")[:most] for name in _FIELDS}
    return kind(**texts)
