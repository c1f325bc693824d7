// SPDX-License-Identifier: GPL-2.0-only
/*
 * window - answers a fixed window from every readahead event
 *
 * When to use: to test starts, sizes, markers, nodes and asynchronous prefetch one by one.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_KNOB(u32, window_pages, 256, "pages", 0, 1048576, "pages read in the reader's context");
PAGECACHE_KNOB(u32, prefetch_pages, 0, "pages", 0, 1048576, "pages prefetched behind them");
PAGECACHE_KNOB(u32, mark_pages, 0, "pages", 0, 1048576, "marker, counted from the index; 0: none");
PAGECACHE_KNOB(s32, node, -1, "NUMA node", -1, 1023, "node to read on; -1: any");
PAGECACHE_KNOB(s32, order, -1, "order", -1, 9, "wished folio order; -1: none");
PAGECACHE_KNOB(u32, drop_pages, 0, "pages", 0, 1048576, "pages dropped in front of the access");

/* Read by the test: events of each kind, flags of all of them, and of reads the first page (and 1)
 * and the number of pages. */
u64 kinds[16];
u64 flags;
u64 read_first, read_pages;

PAGECACHE_READAHEAD(window_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	__sync_fetch_and_add(&kinds[ctx->kind & 15], 1);
	__sync_fetch_and_or(&flags, ctx->flags);
	answer->start = ctx->index;
	answer->nr = window_pages;
	answer->node = node;
	if (order >= 0)
		answer->order = order;
	if (mark_pages)
		answer->mark = ctx->index + mark_pages;
	if (prefetch_pages)
		pagecache_prefetch(ctx, ctx->index + window_pages, prefetch_pages, node, 0);
	return PAGECACHE_OVERRIDE;
}

PAGECACHE_ACCESS(window_access)
(struct pagecache_ctx *ctx)
{
	__sync_fetch_and_add(&kinds[ctx->kind & 15], 1);
	__sync_fetch_and_or(&flags, ctx->flags);
	if (ctx->kind == PAGECACHE_KIND_READ) {
		__sync_val_compare_and_swap(&read_first, 0, ctx->index + 1);
		__sync_fetch_and_add(&read_pages, ctx->nr);
	}
	if (drop_pages && ctx->index >= drop_pages)
		pagecache_drop(ctx, ctx->index - drop_pages, drop_pages);
}

PAGECACHE_POLICY(window, .readahead = (void *)window_readahead, .access = (void *)window_access);
