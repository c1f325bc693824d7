// SPDX-License-Identifier: GPL-2.0-only
/*
 * cyclic - keeps a fixed part of a model that is scanned again and again, streams the rest
 *
 * When to use: a model larger than its memory that is read from front to back in every round:
 *	llama.cpp with mmap, FlexGen, ZeRO-Inference.  LRU then evicts each page just before it is
 *	wanted again and hits nothing; a fixed part of the budget's size is hit in every round.
 * Limits: set budget_mib to what the model may keep, less the window and 1 MiB for the stream.
 *	Files get their parts in the order in which reclaim or a reader meets them first; one that
 *	has no pages left and was not met for 10 s gives its part back when another wants it.
 * Mapped pages of the stream cannot be dropped behind the reader; they go when reclaim comes to
 * them. Engine agent has no say in that, so there it leaves mapped readers to the kernel, and of
 *	others it drops the stream behind the reader.  A reader that runs behind another one in the
 *	same file may find the stream gone.
 */
#include "pieces.bpf.h"

PAGECACHE_KNOB(u32, budget_mib, 0, "MiB", 0, 1073741824,
	       "memory for the part that is kept; 0: all that the engine lets a policy keep");
PAGECACHE_KNOB(u32, window_kib, 8192, "KiB", 0, 4194304,
	       "read ahead in the part that is not kept; 0: as the kernel does");

#define STEP_BYTES (256 << 10) /* between two looks at a reader */

PAGECACHE_GAUGE(granted_pages, "pages", "pages in the parts that are kept");
#define GRANTED granted_pages
#include "grants.bpf.h"

/* The file's part; grant->own: where the reader was looked at last. */
static __always_inline struct grant *part_of(struct pagecache_ctx *ctx)
{
	u64 budget = keep_bound(ctx, budget_mib);
	struct grant *part = grant_find(ctx);

	if (!part)
		return grant_new(ctx, ctx->file_pages, budget, ~0ULL);
	if (grant_may_ask(ctx, part, ctx->file_pages))
		part->pages += grant_take(ctx, ctx->file_pages - part->pages, budget);
	return part;
}

PAGECACHE_INIT(cyclic_init)
(struct pagecache_ctx *ctx)
{
	keep_at_most(ctx, budget_mib);
	return 0;
}

PAGECACHE_ACCESS(cyclic_access)
(struct pagecache_ctx *ctx)
{
	u64 window = pages_of(ctx, (u64)window_kib << 10), at = ctx->index, behind;
	u64 step = pages_of(ctx, STEP_BYTES);
	bool mapped = ctx->kind != PAGECACHE_KIND_READ;
	struct grant *part;
	bool on;

	/* What a reader has mapped cannot be dropped, and the kernel reads around its faults. */
	if (mapped && PAGECACHE_KERNEL_READS)
		return;
	part = part_of(ctx);
	if (!part || (at >= part->own && at < part->own + step))
		return;
	on = at >= part->own && at < part->own + 2 * step;
	part->own = at;
	behind = max_u64(part->pages, drop_from(ctx, at));
	if (at > behind && !mapped)
		pagecache_drop(ctx, behind, at - behind);
	/* A reader that goes on has asked for the rest of its window before. */
	if (window && at + window >= part->pages)
		pagecache_prefetch(ctx, on ? at + window : at + ctx->nr, on ? step : window,
				   PAGECACHE_NODE_ANY, 0);
}

PAGECACHE_REMOVED(cyclic_removed)
(struct pagecache_ctx *ctx)
{
	grant_removed(ctx);
}

PAGECACHE_EVICT(cyclic_evict)
(struct pagecache_ctx *ctx)
{
	struct grant *part = part_of(ctx);

	return part && ctx->index < part->pages ? PAGECACHE_EVICT_KEEP : PAGECACHE_EVICT_NOW;
}

PAGECACHE_POLICY(cyclic, .init = (void *)cyclic_init, .access = (void *)cyclic_access,
		 .removed = (void *)cyclic_removed, .evict = (void *)cyclic_evict,
		 .access_step_bytes = STEP_BYTES);
