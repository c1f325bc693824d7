# SPDX-License-Identifier: Apache-2.0
"""How the controller's descriptors are shared out among users who take what they can get."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagecache_bpf.controller import client_sessions
from pagecache_bpf.controller.client_sessions import ClientSession, check_room, connections_for
from pagecache_bpf.errors import UsageError

LIMIT = 65536
ROOT = (0, True)


class Users:
    """Sessions of users, with files that are numbers only."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.sessions: dict[int, tuple[Any, ClientSession]] = {}

    def take(self, uid: int, more: int) -> None:
        connection, session = self.sessions.setdefault(
            uid, (SimpleNamespace(owner=(uid, False)), ClientSession())
        )
        check_room(connection.owner, more, self.sessions.values(), (), self.limit)
        session.files += [(0, None)] * more  # type: ignore[list-item]

    def take_all(self, uid: int) -> int:
        """What a user gets who takes as much as it can."""
        with pytest.raises(UsageError, match="files were refused"):
            while True:
                self.take(uid, 64)
        return len(self.sessions[uid][1].files)


def test_s5_a_newcomer_finds_room_however_many_take_what_they_can() -> None:
    users = Users(LIMIT)
    got = [users.take_all(uid) for uid in range(1, 9)]
    assert got[0] >= 4000  # alone, a user may have as many as a load takes
    assert all(later >= 64 for later in got)
    needed = 3 * sum(got)
    assert needed <= LIMIT * 3 // 8
    users.take(99, 64)


def test_a_user_alone_has_a_bound_and_root_only_that() -> None:
    users = Users(1 << 20)
    assert users.take_all(1) == client_sessions.FILES_PER_USER
    check_room(ROOT, 4096, users.sessions.values(), (), limit=1024)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1024, 1 << 20),
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 64)), max_size=60),
)
def test_all_shares_together_leave_the_controller_its_own(
    limit: int, requests: list[tuple[int, int]]
) -> None:
    """Whoever asks for whatever: an eighth is left, but for a first message of each user."""
    users = Users(limit)
    for uid, more in requests:
        try:
            users.take(uid, more)
        except UsageError:
            continue
    needed = sum(3 * len(session.files) for _, session in users.sessions.values())
    first = 3 * 64 * len(users.sessions)
    assert needed <= max(limit * 3 // 8, first) + first
    assert connections_for(limit) * 3 <= limit * 3 // 10
