// SPDX-License-Identifier: GPL-2.0-only
/*
 * mru - evicts what was used most recently
 *
 * When to use: data that is scanned from beginning to end, again and again, and does not fit: a
 *	source tree that is searched, a data set read in the same order each epoch.  What was there
 *	first stays and is hit in every round.  A baseline to compare other policies with.
 * Limits: wrong for everything that is used again soon.  It cannot know a round's end.  Engine
 *	agent has no say in evictions.
 */
#include "pieces.bpf.h"

PAGECACHE_KNOB(u32, skip_kib, 512, "KiB", 0, 1048576, "the very last used is left alone");
PAGECACHE_KNOB(u32, recent_mib, 8, "MiB", 1, 1048576, "what was used after that goes first");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct piece_key);
	__type(value, u64);
} last_use SEC(".maps");

static u64 used; /* pages, by all accesses so far */

PAGECACHE_ACCESS(mru_access)
(struct pagecache_ctx *ctx)
{
	u64 now = __sync_fetch_and_add(&used, ctx->nr) + ctx->nr;
	struct piece_key key = piece_at(ctx, ctx->index);

	bpf_map_update_elem(&last_use, &key, &now, BPF_ANY);
}

PAGECACHE_EVICT(mru_evict)
(struct pagecache_ctx *ctx)
{
	u64 skip = pages_of(ctx, (u64)skip_kib << 10),
	    recent = pages_of(ctx, (u64)recent_mib << 20);
	struct piece_key key = piece_at(ctx, ctx->index);
	u64 *at = bpf_map_lookup_elem(&last_use, &key), age;

	if (!at)
		return PAGECACHE_EVICT_DEFAULT;
	age = used - *at;
	return age >= skip && age < skip + recent ? PAGECACHE_EVICT_NOW : PAGECACHE_EVICT_KEEP;
}

PAGECACHE_POLICY(mru, .access = (void *)mru_access, .evict = (void *)mru_evict);
