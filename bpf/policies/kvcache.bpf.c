// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvcache - KV-cache files: dropped behind the reader unless wanted soon, within a budget
 *
 * When to use: key/value caches that are spilled to files and read back (SolidAttention, Bidaw):
 *	most of them is read once, and must not push out the weights beside it.  The serving layer
 *	says in the map `next_use` when it needs a piece again.
 * Limits: what is written stays until it is on the device, whatever the budget; with the module,
 *	until a reader comes by or memory is short.  Ranges that are mapped cannot be dropped
 *	behind; reclaim takes them first.  A piece is 1 MiB.
 */
#include "pieces.bpf.h"

PAGECACHE_KNOB(u32, budget_mib, 256, "MiB", 1, 1073741824, "page cache for these files together");
PAGECACHE_KNOB(u32, horizon_ms, 10000, "ms", 1, 3600000, "wanted within this time is soon");

#define MAX_PIECES 65536 /* of a file: 64 GiB */

struct use {
	u64 due_ns; /* CLOCK_MONOTONIC */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct piece_key);
	__type(value, struct use);
} next_use PAGECACHE_HINT("when a piece of 1 MiB is read next") SEC(".maps");

struct range {
	u64 start;
	u64 nr;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct piece_key);
	__type(value, struct range);
} last_read SEC(".maps");

static __always_inline bool wanted_soon(const struct pagecache_ctx *ctx, u64 index)
{
	struct piece_key key = piece_at(ctx, index);
	struct use *use = bpf_map_lookup_elem(&next_use, &key);

	return use && use->due_ns >= ctx->time_ns &&
	       use->due_ns - ctx->time_ns < (u64)horizon_ms * 1000000;
}

static __always_inline bool over_budget(const struct pagecache_ctx *ctx)
{
	return ctx->governed_pages > pages_of(ctx, (u64)budget_mib << 20);
}

PAGECACHE_INIT(kvcache_init)
(struct pagecache_ctx *ctx)
{
	keep_at_most(ctx, budget_mib);
	return 0;
}

PAGECACHE_ACCESS(kvcache_access)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = file_key_of(ctx);
	struct range now = { ctx->index, ctx->nr }, last;
	u64 piece = pages_per_piece(ctx);
	struct range *found = bpf_map_lookup_elem(&last_read, &key);

	last = found ? *found : now;
	bpf_map_update_elem(&last_read, &key, &now, BPF_ANY);
	/* The same range read on is not behind yet. */
	if (last.start + last.nr > now.start && last.start < now.start + now.nr)
		return;
	if (!over_budget(ctx) && wanted_soon(ctx, last.start))
		return;
	/* With what lies before it, to cover large folios. */
	now = last;
	for (int i = 0; i < 4; i++) {
		u64 before = now.start > piece ? now.start - piece : 0;

		if (wanted_soon(ctx, before))
			break;
		now.start = before;
	}
	pagecache_drop(ctx, now.start, last.start + last.nr - now.start);
}

/* A writer over its budget.  Only engine agent can drop here. */
PAGECACHE_ADDED(kvcache_added)
(struct pagecache_ctx *ctx)
{
	u64 piece = pages_per_piece(ctx);

	if (PAGECACHE_KERNEL_READS && ctx->file_id && ctx->index % piece < ctx->nr &&
	    ctx->index >= 4 * piece && over_budget(ctx) &&
	    !wanted_soon(ctx, ctx->index - 4 * piece))
		pagecache_drop(ctx, ctx->index - 4 * piece, piece);
}

PAGECACHE_EVICT(kvcache_evict)
(struct pagecache_ctx *ctx)
{
	return wanted_soon(ctx, ctx->index) ? PAGECACHE_EVICT_KEEP : PAGECACHE_EVICT_NOW;
}

struct search {
	struct pagecache_ctx *ctx;
	u64 wanted; /* pages */
	bool soon; /* pieces that are wanted soon go as well */
};

static long drop_piece(u32 i, struct search *search)
{
	struct pagecache_ctx *ctx = search->ctx;
	u64 pages = pages_per_piece(ctx), start = i * pages;

	if (start >= ctx->file_pages || !search->wanted)
		return 1;
	if (wanted_soon(ctx, start) == search->soon && pagecache_drop(ctx, start, pages) > 0)
		search->wanted -= min_u64(search->wanted, pages);
	return 0;
}

/* What nobody wants soon, and only if that is not enough what somebody does; no more than needed.
 */
PAGECACHE_PRESSURE(kvcache_pressure)
(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
	struct search search = { ctx, want->pages, want->round > 0 };

	bpf_loop(MAX_PIECES, drop_piece, &search, 0);
}

PAGECACHE_POLICY(kvcache, .init = (void *)kvcache_init, .access = (void *)kvcache_access,
		 .added = (void *)kvcache_added, .evict = (void *)kvcache_evict,
		 .pressure = (void *)kvcache_pressure);
