// SPDX-License-Identifier: GPL-2.0-only
/*
 * s3fifo - a small queue for what is new, a main queue for what was used again
 *
 * When to use: mixed reads of which many are never repeated: one-hit wonders leave the small queue
 *	without pushing out the rest.  A baseline to compare other policies with.
 * Limits: queues are of pieces of 1 MiB.  Reclaim looks at them in an order of its own; what is
 *	not of the oldest eighth of its queue is kept until it is.  Engine agent has no say in
 *	evictions.
 *
 * Source: J. Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023, section 4.
 */
#include "pieces.bpf.h"

PAGECACHE_KNOB(u32, small_percent, 10, "percent", 1, 90, "share of the small queue");

struct state {
	u32 main; /* 1: in the main queue */
	u32 uses; /* up to 3 */
	u64 resident; /* pages */
	u64 entered; /* the queue's clock when it came there */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, 1); /* BPF_F_NO_PREALLOC */
	__type(key, struct piece_key);
	__type(value, struct state);
} states SEC(".maps");

/*
 * Pieces that left the small queue unused: they come back into the main one, if no more has left it
 * since than the main queue holds.  The value is how many pages had left it then.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct piece_key);
	__type(value, u64);
} ghosts SEC(".maps");

/* Clocks, in pages: what has entered a queue so far, and left the small one. */
static u64 small_entered, main_entered, small_left;
static u64 small_pages;

struct reading {
	struct pagecache_ctx *ctx;
	u32 pieces;
};

/* Reading through a piece is one use of it, which is counted where it begins. */
LOOP_STEP(use_piece, MAX_PIECES_READ, u32 i, struct reading *reading)
{
	struct pagecache_ctx *ctx = reading->ctx;
	u64 piece = pages_per_piece(ctx), start = ctx->index + i * piece;
	struct piece_key key = piece_at(ctx, start);
	struct state *state;

	if (i >= reading->pieces)
		return 1;
	state = bpf_map_lookup_elem(&states, &key);
	if (i)
		start -= start % piece;
	if (state && state->resident && start % piece == 0 && state->uses < 3)
		state->uses++;
	return 0;
}

PAGECACHE_ACCESS(s3fifo_access)
(struct pagecache_ctx *ctx)
{
	struct reading reading = { ctx, pieces_of(ctx) };

	LOOP(use_piece, &reading);
}

static __always_inline bool is_remembered(const struct pagecache_ctx *ctx, const u64 *left)
{
	return left && (small_left - *left) * 100 <= ctx->governed_pages * (100 - small_percent);
}

PAGECACHE_ADDED(s3fifo_added)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = piece_at(ctx, ctx->index);
	struct state *state = bpf_map_lookup_elem(&states, &key), fresh = {};

	if (!state || (s64)state->resident <= 0) {
		fresh.main = is_remembered(ctx, bpf_map_lookup_elem(&ghosts, &key));
		fresh.entered = fresh.main ? main_entered : small_entered;
		bpf_map_update_elem(&states, &key, &fresh, BPF_ANY);
		bpf_map_delete_elem(&ghosts, &key);
		state = bpf_map_lookup_elem(&states, &key);
	}
	if (!state)
		return;
	__sync_fetch_and_add(&state->resident, ctx->nr);
	__sync_fetch_and_add(state->main ? &main_entered : &small_entered, ctx->nr);
	if (!state->main)
		__sync_fetch_and_add(&small_pages, ctx->nr);
}

PAGECACHE_REMOVED(s3fifo_removed)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = piece_at(ctx, ctx->index);
	struct state *state = bpf_map_lookup_elem(&states, &key);
	u64 left;

	if (!state)
		return;
	__sync_fetch_and_add(&state->resident, -ctx->nr);
	if (!state->main) {
		__sync_fetch_and_add(&small_pages, -ctx->nr);
		left = __sync_fetch_and_add(&small_left, ctx->nr) + ctx->nr;
		bpf_map_update_elem(&ghosts, &key, &left, BPF_ANY);
	}
	if ((s64)state->resident <= 0)
		bpf_map_delete_elem(&states, &key);
}

/* A piece is the youngest of the main queue. */
static __always_inline void enter_main(struct state *state)
{
	state->entered = __sync_fetch_and_add(&main_entered, state->resident);
}

static __always_inline bool is_old(u64 clock, const struct state *state, u64 queue_pages)
{
	return (clock - state->entered) * 8 >= queue_pages * 7;
}

PAGECACHE_EVICT(s3fifo_evict)
(struct pagecache_ctx *ctx)
{
	bool small_is_full = small_pages * 100 >= ctx->governed_pages * small_percent;
	u64 main_pages = ctx->governed_pages - min_u64(small_pages, ctx->governed_pages);
	struct piece_key key = piece_at(ctx, ctx->index);
	struct state *state = bpf_map_lookup_elem(&states, &key);

	if (!state)
		return PAGECACHE_EVICT_NOW;
	if (!state->main) {
		if (!small_is_full || !is_old(small_entered, state, small_pages))
			return PAGECACHE_EVICT_KEEP;
		if (state->uses < 2)
			return PAGECACHE_EVICT_NOW;
		state->main = 1;
		state->uses = 0;
		__sync_fetch_and_add(&small_pages, -state->resident);
		enter_main(state);
		return PAGECACHE_EVICT_KEEP;
	}
	if (small_is_full || !is_old(main_entered, state, main_pages))
		return PAGECACHE_EVICT_KEEP;
	if (!state->uses)
		return PAGECACHE_EVICT_NOW;
	state->uses--;
	enter_main(state);
	return PAGECACHE_EVICT_KEEP;
}

PAGECACHE_POLICY(s3fifo, .access = (void *)s3fifo_access, .added = (void *)s3fifo_added,
		 .removed = (void *)s3fifo_removed, .evict = (void *)s3fifo_evict);
