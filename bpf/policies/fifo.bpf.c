// SPDX-License-Identifier: GPL-2.0-only
/*
 * fifo - evicts in the order of arrival, however often something was used
 *
 * When to use: as a baseline to compare other policies with.
 * Limits: order is kept for pieces of 1 MiB, not for pages, and about: what belongs to the oldest
 *	eighth may go.  Engine agent has no say in evictions.
 */
#include "pieces.bpf.h"

struct arrival {
	u64 at; /* pages that had arrived before */
	u64 resident; /* pages of the piece */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct piece_key);
	__type(value, struct arrival);
} arrivals SEC(".maps");

static u64 arrived; /* pages */

PAGECACHE_ADDED(fifo_added)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = piece_at(ctx, ctx->index);
	struct arrival *found = bpf_map_lookup_elem(&arrivals, &key);
	u64 now = __sync_fetch_and_add(&arrived, ctx->nr);
	struct arrival fresh = { now, ctx->nr };

	if (found && (s64)found->resident > 0)
		__sync_fetch_and_add(&found->resident, ctx->nr);
	else
		bpf_map_update_elem(&arrivals, &key, &fresh, BPF_ANY);
}

PAGECACHE_REMOVED(fifo_removed)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = piece_at(ctx, ctx->index);
	struct arrival *found = bpf_map_lookup_elem(&arrivals, &key);

	if (found)
		__sync_fetch_and_add(&found->resident, -ctx->nr);
}

PAGECACHE_EVICT(fifo_evict)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = piece_at(ctx, ctx->index);
	struct arrival *found = bpf_map_lookup_elem(&arrivals, &key);

	if (!found)
		return PAGECACHE_EVICT_NOW;
	return (arrived - found->at) * 8 >= ctx->governed_pages * 7 ? PAGECACHE_EVICT_NOW
								    : PAGECACHE_EVICT_KEEP;
}

PAGECACHE_POLICY(fifo, .added = (void *)fifo_added, .removed = (void *)fifo_removed,
		 .evict = (void *)fifo_evict);
