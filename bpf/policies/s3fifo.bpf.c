// SPDX-License-Identifier: GPL-2.0-only
/*
 * s3fifo - a small queue for what is new, a main queue for what was used again
 *
 * When to use: mixed reads of which many are never repeated: one-hit wonders leave the small queue
 *	without pushing out the rest.  A baseline to compare other policies with.
 * Limits: queues are of pieces of 1 MiB, in the order in which reclaim looks at them.  Engine
 *	agent has no say in evictions.
 *
 * Source: J. Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023, section 4.
 */
#include "pieces.bpf.h"

PAGECACHE_KNOB(u32, small_percent, 10, "percent", 1, 90, "share of the small queue");

struct state {
	u32 main; /* 1: in the main queue */
	u32 uses; /* up to 3 */
	u64 resident; /* pages */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, 1); /* BPF_F_NO_PREALLOC */
	__type(key, struct piece_key);
	__type(value, struct state);
} states SEC(".maps");

/*
 * Pieces that left the small queue unused: they come back into the main one, if no more was evicted
 * meanwhile than the cache holds.  The value is the clock of evictions when they left.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct piece_key);
	__type(value, u64);
} ghosts SEC(".maps");

static u64 small_pages, evicted_pages;

struct reading {
	struct pagecache_ctx *ctx;
};

/* Reading through a piece is one use of it, which is counted where it begins. */
static long use_piece(u32 i, struct reading *reading)
{
	struct pagecache_ctx *ctx = reading->ctx;
	u64 piece = pages_per_piece(ctx), start = ctx->index + i * piece;
	struct piece_key key = piece_at(ctx, start);
	struct state *state = bpf_map_lookup_elem(&states, &key);

	if (i)
		start -= start % piece;
	if (state && state->resident && start % piece == 0 && state->uses < 3)
		state->uses++;
	return 0;
}

PAGECACHE_ACCESS(s3fifo_access)
(struct pagecache_ctx *ctx)
{
	struct reading reading = { ctx };

	bpf_loop(pieces_of(ctx), use_piece, &reading, 0);
}

PAGECACHE_ADDED(s3fifo_added)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = piece_at(ctx, ctx->index);
	struct state *state = bpf_map_lookup_elem(&states, &key), fresh = {};
	u64 *left;

	if (!state || (s64)state->resident <= 0) {
		left = bpf_map_lookup_elem(&ghosts, &key);
		fresh.main = left && evicted_pages - *left <= ctx->governed_pages;
		bpf_map_update_elem(&states, &key, &fresh, BPF_ANY);
		bpf_map_delete_elem(&ghosts, &key);
		state = bpf_map_lookup_elem(&states, &key);
	}
	if (!state)
		return;
	__sync_fetch_and_add(&state->resident, ctx->nr);
	if (!state->main)
		__sync_fetch_and_add(&small_pages, ctx->nr);
}

PAGECACHE_REMOVED(s3fifo_removed)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = piece_at(ctx, ctx->index);
	struct state *state = bpf_map_lookup_elem(&states, &key);
	u64 now = __sync_fetch_and_add(&evicted_pages, ctx->nr) + ctx->nr;

	if (!state)
		return;
	__sync_fetch_and_add(&state->resident, -ctx->nr);
	if (!state->main) {
		__sync_fetch_and_add(&small_pages, -ctx->nr);
		bpf_map_update_elem(&ghosts, &key, &now, BPF_ANY);
	}
	if ((s64)state->resident <= 0)
		bpf_map_delete_elem(&states, &key);
}

PAGECACHE_EVICT(s3fifo_evict)
(struct pagecache_ctx *ctx)
{
	bool small_is_full = small_pages * 100 >= ctx->governed_pages * small_percent;
	struct piece_key key = piece_at(ctx, ctx->index);
	struct state *state = bpf_map_lookup_elem(&states, &key);

	if (!state)
		return PAGECACHE_EVICT_NOW;
	if (!state->main) {
		if (!small_is_full)
			return PAGECACHE_EVICT_KEEP;
		if (state->uses < 2)
			return PAGECACHE_EVICT_NOW;
		state->main = 1;
		state->uses = 0;
		__sync_fetch_and_add(&small_pages, -state->resident);
		return PAGECACHE_EVICT_KEEP;
	}
	if (small_is_full)
		return PAGECACHE_EVICT_KEEP;
	if (!state->uses)
		return PAGECACHE_EVICT_NOW;
	state->uses--;
	return PAGECACHE_EVICT_KEEP;
}

PAGECACHE_POLICY(s3fifo, .access = (void *)s3fifo_access, .added = (void *)s3fifo_added,
		 .removed = (void *)s3fifo_removed, .evict = (void *)s3fifo_evict);
