# SPDX-License-Identifier: Apache-2.0
"""colocate: offline scans push nothing out, and roles switch at once."""

from __future__ import annotations

from tests.unit.policies.traces import MIB, Script, compare


def setting() -> Script:
    script = Script()
    script.has("/w/w.bin", 20)
    script.has("/d/d.bin", 64)
    # The names have to be known before a role is given to them.
    script.scan("/w/w.bin", 0, 128 << 10, by="server", cgroup="online")
    script.scan("/d/d.bin", 0, 128 << 10, by="batch", cgroup="offline")
    return script


def roles(script: Script, online: int, offline: int) -> None:
    script.tell("roles", {"cgroup_id": "online"}, value=online)
    script.tell("roles", {"cgroup_id": "offline"}, value=offline)


def test_offline_scans_do_not_push_out_online_weights() -> None:
    script = setting()
    roles(script, 1, 2)
    for _ in range(3):
        script.scan("/w/w.bin", by="server", cgroup="online")
        script.scan("/d/d.bin", by="batch", cgroup="offline")
    found = compare("colocate", script, 32 * MIB)
    assert found.default.hit_bytes < 10 * MIB
    assert found.policy.hit_bytes >= 2 * 20 * MIB


def test_a_switch_takes_effect_at_once() -> None:
    """After it, what was kept is the first to go, and the other side is kept."""
    script = setting()
    roles(script, 1, 2)
    script.scan("/w/w.bin", by="server", cgroup="online")
    roles(script, 2, 1)
    script.scan("/d/d.bin", 0, 24 * MIB, by="batch", cgroup="offline")
    script.scan("/w/w.bin", by="server", cgroup="online")
    before = compare("colocate", script, 32 * MIB).policy.hit_bytes
    script.scan("/d/d.bin", 0, 24 * MIB, by="batch", cgroup="offline")
    after = compare("colocate", script, 32 * MIB).policy.hit_bytes
    assert after - before == 24 * MIB


def test_without_roles_it_is_the_kernel() -> None:
    script = setting()
    for _ in range(3):
        script.scan("/w/w.bin", by="server", cgroup="online")
        script.scan("/d/d.bin", by="batch", cgroup="offline")
    found = compare("colocate", script, 32 * MIB)
    assert found.policy.hit_bytes == found.default.hit_bytes


def test_a_role_is_that_of_the_groups_below_too() -> None:
    """As a pod's is of its containers; what is written for one of them comes first."""
    script = setting()
    roles(script, 1, 2)
    for _ in range(3):
        script.scan("/w/w.bin", by="server", cgroup="online/pod/server")
        script.scan("/d/d.bin", by="batch", cgroup="offline/job")
    found = compare("colocate", script, 32 * MIB)
    assert found.policy.hit_bytes >= 2 * 20 * MIB
    script.tell("roles", {"cgroup_id": "offline/job"}, value=0)
    before = found.policy.totals["dropped_bytes"]
    assert before > 0
    script.scan("/d/d.bin", by="batch", cgroup="offline/job")
    assert compare("colocate", script, 32 * MIB).policy.totals["dropped_bytes"] == before
