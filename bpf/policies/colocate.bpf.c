// SPDX-License-Identifier: GPL-2.0-only
/*
 * colocate - online and offline work on one machine: scans of the offline side push nothing out
 *
 * When to use: a service with a latency goal beside batch work on the same weights or data (xLLM).
 *	The map `roles` says which control group is online and which offline; writing it again
 *	switches a role at once.  Pages that online work uses are kept, what offline work reads is
 *	dropped behind it.
 *	A role is that of a control group and of those below it, up to 8 levels from the root; the
 *	nearest one that is written counts.
 * Limits: a control group without a role is treated as the kernel does; so is one below a role
 *	until it has read a file.  A file that both use counts as online.
 *	Engine agent cannot keep pages from being evicted; it drops behind the offline side.
 */
#include "pieces.bpf.h"

PAGECACHE_KNOB(u32, budget_mib, 0, "MiB", 0, 1073741824,
	       "memory kept for online work; 0: all that the engine lets a policy keep");

#define STEP_BYTES (1 << 20)

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

#define LEVELS 8

/* A control group and those above it, from the one below the root down; they never change. */
struct lineage {
	u64 ids[LEVELS];
};

/* Of readers; reclaim asks for whom pages are charged, in any task. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct cgroup_key);
	__type(value, struct lineage);
} lineages SEC(".maps");

static __always_inline void learn_lineage(const struct pagecache_ctx *ctx)
{
	struct cgroup_key key = { ctx->cgroup_id };
	struct lineage fresh = {};

	if (bpf_map_lookup_elem(&lineages, &key))
		return;
	for (int i = 0; i < LEVELS; i++) {
		fresh.ids[i] = bpf_get_current_ancestor_cgroup_id(i + 1);
		/* What lies below the one that is charged has nothing to do with it. */
		if (!fresh.ids[i] || fresh.ids[i] == ctx->cgroup_id)
			break;
	}
	bpf_map_update_elem(&lineages, &key, &fresh, BPF_ANY);
}

static __always_inline u32 *written_role(u64 cgroup)
{
	struct cgroup_key key = { cgroup };

	return bpf_map_lookup_elem(&roles, &key);
}

static __noinline u32 role_of(u64 cgroup)
{
	struct cgroup_key key = { cgroup };
	struct lineage *above;
	u32 *role = written_role(cgroup);

	if (role)
		return *role;
	above = bpf_map_lookup_elem(&lineages, &key);
	for (int i = LEVELS - 1; above && i >= 0; i--) {
		role = above->ids[i] ? written_role(above->ids[i]) : NULL;
		if (role)
			return *role;
	}
	return NONE;
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
	u64 start = drop_from(ctx, ctx->index);
	u32 role;

	learn_lineage(ctx);
	role = role_of(ctx->cgroup_id);
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
	nr = min_u64(max_u64(want->pages, pages_of(ctx, STEP_BYTES)), use->index);
	if (nr)
		pagecache_drop(ctx, use->index - nr, nr);
}

PAGECACHE_POLICY(colocate, .init = (void *)colocate_init, .access = (void *)colocate_access,
		 .evict = (void *)colocate_evict, .pressure = (void *)colocate_pressure,
		 .access_step_bytes = STEP_BYTES);
