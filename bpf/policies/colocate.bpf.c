// SPDX-License-Identifier: GPL-2.0-only
/*
 * colocate - online and offline work on one machine: scans of the offline side push nothing out
 *
 * When to use: a service with a latency goal beside batch work on the same weights or data (xLLM).
 *	The map `roles` says which control group is online and which offline; writing it again
 *	switches a role at once.  Pages that online work uses are kept, what offline work reads is
 *	dropped behind it.
 * Limits: a role is that of exactly this control group, not of those below it.  A control group
 *	without a role is treated as the kernel does.  A file that both use counts as online.
 *	Engine agent cannot keep pages from being evicted; it drops behind the offline side.
 */
#include "pieces.bpf.h"

PAGECACHE_KNOB(u32, budget_mib, 0, "MiB", 0, 1073741824,
	       "memory kept for online work; 0: all that the engine lets a policy keep");

#define STEP 256

enum role { NONE = 0, ONLINE = 1, OFFLINE = 2 };

struct cgroup_key {
	u64 cgroup_id;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__uint(map_flags, 1); /* BPF_F_NO_PREALLOC */
	__type(key, struct cgroup_key);
	__type(value, u32);
} roles PAGECACHE_HINT("what a control group does: 1 online, 2 offline, 0 neither") SEC(".maps");

struct use {
	u64 cgroup_id;
	u64 index; /* where it read last */
};

/* Who used a file last; online before all others. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct piece_key);
	__type(value, struct use);
} users SEC(".maps");

static __always_inline u32 role_of(u64 cgroup)
{
	struct cgroup_key key = { cgroup };
	u32 *role = bpf_map_lookup_elem(&roles, &key);

	return role ? *role : NONE;
}

static __always_inline bool used_online(const struct pagecache_ctx *ctx)
{
	struct piece_key key = file_key_of(ctx);
	struct use *use = bpf_map_lookup_elem(&users, &key);

	return use && role_of(use->cgroup_id) == ONLINE;
}

PAGECACHE_INIT(colocate_init)
(struct pagecache_ctx *ctx)
{
	keep_at_most(ctx, budget_mib);
	return 0;
}

PAGECACHE_ACCESS(colocate_access)
(struct pagecache_ctx *ctx)
{
	struct use now = { ctx->cgroup_id, ctx->index };
	struct piece_key key = file_key_of(ctx);
	u32 role = role_of(ctx->cgroup_id);
	u64 start = drop_from(ctx, ctx->index);

	if (role == ONLINE || !used_online(ctx))
		bpf_map_update_elem(&users, &key, &now, BPF_ANY);
	if (role == OFFLINE && ctx->index > start && !used_online(ctx))
		pagecache_drop(ctx, start, ctx->index - start);
}

PAGECACHE_EVICT(colocate_evict)
(struct pagecache_ctx *ctx)
{
	u32 role = role_of(ctx->cgroup_id);

	if (role == ONLINE || used_online(ctx))
		return PAGECACHE_EVICT_KEEP;
	return role == OFFLINE ? PAGECACHE_EVICT_NOW : PAGECACHE_EVICT_DEFAULT;
}

/* What the reader has passed, the last of it first: ahead of it lies what was read for it. */
PAGECACHE_PRESSURE(colocate_pressure)
(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
	struct piece_key key = file_key_of(ctx);
	struct use *use = bpf_map_lookup_elem(&users, &key);
	u64 nr;

	if (!use || role_of(use->cgroup_id) != OFFLINE)
		return;
	nr = min_u64(max_u64(want->pages, STEP), use->index);
	if (nr)
		pagecache_drop(ctx, use->index - nr, nr);
}

PAGECACHE_POLICY(colocate, .init = (void *)colocate_init, .access = (void *)colocate_access,
		 .evict = (void *)colocate_evict, .pressure = (void *)colocate_pressure,
		 .access_step_pages = STEP);
