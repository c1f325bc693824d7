# SPDX-License-Identifier: Apache-2.0
"""The recording of a load: a process beside it that watches what the load's files go through.

It starts that process and tells it what serves the load; what a recording holds, recording knows.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.recording.phases import VARIABLE, added_to, taken_from
from pagecache_bpf.weights.models import Model

#: For the recorder to begin, and to write what it has recorded, in seconds.
START_SECONDS, END_SECONDS = 60.0, 120.0


class LoadRecording:
    """A recording that is being made of a load in this process."""

    def __init__(
        self,
        model: Model,
        output: Path,
        device_limit: float | None = None,
        template: str | None = None,
    ) -> None:
        """Begin it; nothing that happens after this is missed.

        Args:
            model: whose files are watched.
            output: where the recording goes at the end.
            device_limit: bytes per second that the device gives, if that is known.
            template: path of the I/O template that the load was given, if it was.

        Raises:
            PagecacheError: nothing can be recorded here.
            OSError: no process can be started.
        """
        from pagecache_bpf.policy.agent_device import environment
        from pagecache_bpf.recording.process import Task

        if os.geteuid() != 0:
            raise PagecacheError("recording a load takes root")
        self.output = output
        files = [str(path) for path in model.files]
        task = Task(
            model=model.name,
            root=str(model.root),
            files=files,
            output=str(output),
            pid=os.getpid(),
            device_limit=device_limit,
            template=os.path.abspath(template) if template else None,
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pagecache_bpf.recording.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the load's to obey
            cwd="/",
            env=environment(os.environ),
        )
        try:
            self._send(task.as_line())
            self._phases = self._answer("phases", START_SECONDS)
        except BaseException:
            self._process.kill()
            self.forget()
            self._process.wait()
            raise
        os.environ[VARIABLE] = added_to(os.environ, self._phases)

    def tell(self, policy: str | None, engine: str) -> None:
        """Say what serves the load, once that is known.

        Args:
            policy: the policy; None: none does.
            engine: what runs it.
        """
        line = json.dumps({"policy": policy if engine != "none" else "", "engine": engine})
        with suppress(OSError):
            self._send(line.encode() + b"\n")

    def end(self) -> None:
        """End it and wait until it is written.

        Raises:
            PagecacheError: there is no recording, and why.
        """
        rest = taken_from(os.environ, self._phases)
        if rest:
            os.environ[VARIABLE] = rest
        else:
            os.environ.pop(VARIABLE, None)
        try:
            with suppress(OSError):
                assert self._process.stdin is not None
                self._process.stdin.close()
            self._answer("recording", END_SECONDS)
        finally:
            self.forget()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()

    def forget(self) -> None:
        """Close this process's ends; in a child of fork() the recording stays the parent's."""
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()

    def _send(self, line: bytes) -> None:
        """Write a line to the recorder.  Raises OSError if it has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()

    def _answer(self, name: str, timeout: float) -> str:
        """Wait for the recorder's next line and return a member of it.  Raises PagecacheError."""
        assert self._process.stdout is not None
        waiting = select.poll()  # a server has more descriptors than select() takes
        waiting.register(self._process.stdout, select.POLLIN)
        ready = waiting.poll(timeout * 1000)
        line = self._process.stdout.readline() if ready else b""
        try:
            said = json.loads(line)
        except ValueError:
            why = "it has ended" if ready else f"it did not answer in {timeout:g} seconds"
            raise PagecacheError("the recorder has failed", why) from None
        if name not in said:
            raise PagecacheError(str(said.get("error", "the recorder has failed")))
        return str(said[name])
