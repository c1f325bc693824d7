# SPDX-License-Identifier: Apache-2.0
"""What root has attached and tagged for as long as a connection lives.

A server that loads its model as root leases a policy and its tags: they go with its connection,
and so also when it is killed, and while a policy is still being attached for it.  What commands
attach and tag is nobody's lease and stays.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pagecache_bpf.agent.engine import Agent
from pagecache_bpf.agent.service import Service
from pagecache_bpf.errors import PagecacheError
from pagecache_bpf.kernel.file_key import key_of

_log = logging.getLogger(__name__)


class Leases:
    """Policies and tags by the connection that they end with.

    Its methods are called with the lock held that the service's operations take.

    Args:
        service: the policies of engine agent.
    """

    #: Operations of the service whose result can be leased.
    OPERATIONS = frozenset({"attach", "tag"})

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tags: dict[object, dict[bytes, str]] = {}  # by connection: files and their policies
        #: Policies that were attached for a lease, and the connections that use them.
        self._policies: dict[str, tuple[Agent, set[object]]] = {}

    def has(self, connection: object) -> bool:
        """Return whether something ends with a connection.

        Args:
            connection: the connection of a client on the root socket.

        Returns:
            Whether it has leased anything.
        """
        return connection in self._tags

    def take(self, connection: object, name: str, arguments: Mapping[str, Any]) -> None:
        """Note what has just been done for a connection.

        Args:
            connection: with which it ends.
            name: which of OPERATIONS was done.
            arguments: those of the operation.
        """
        tags = self._tags.setdefault(connection, {})
        if name == "tag":
            policy = arguments["policy"]
            tags[key_of(arguments["fd"])] = policy
            if policy in self._policies:
                self._policies[policy][1].add(connection)
        else:
            # The last that was attached: the request may have named its file.
            policy, agent = list(self._service.agents.items())[-1]
            self._policies[policy] = (agent, {connection})

    def end(self, connection: object) -> bool:
        """Take back what a connection has leased.

        A policy goes when nobody who has leased it is left, and no file that it governs.

        Args:
            connection: the connection that was closed.

        Returns:
            Whether anything was leased.
        """
        tags = self._tags.pop(connection, None)
        if tags is None:
            return False
        for key, policy in tags.items():
            agent = self._service.agents.get(policy)
            if agent is not None and key in agent.tags:
                self._service.observed.forget(key)
                agent.untag(key)
        for policy, (leased, users) in list(self._policies.items()):
            users.discard(connection)
            agent = self._service.agents.get(policy)
            if agent is leased and (users or agent.tags):
                continue
            del self._policies[policy]
            if agent is leased:
                with suppress(PagecacheError):
                    self._service.detach(policy)
                    _log.info("detached %s: whoever had it attached is gone", policy)
        return True
