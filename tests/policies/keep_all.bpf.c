// SPDX-License-Identifier: GPL-2.0-only
/*
 * keep_all - keeps every folio that reclaim asks about
 *
 * When to use: to see that keeping ends at the budget, and where reclaim made no progress.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_KNOB(u64, keep_pages, 0, "pages", 0, 1000000000, "budget; 0: as much as the module lets");

/* Read by the test. */
s64 granted;
u64 flags_seen, priority_seen, kinds_seen;
struct pagecache_ctx last;

PAGECACHE_INIT(keep_all_init)
(struct pagecache_ctx *ctx)
{
	if (keep_pages)
		granted = pagecache_keep_budget(ctx, keep_pages);
	return 0;
}

PAGECACHE_EVICT(keep_all_evict)
(struct pagecache_ctx *ctx)
{
	flags_seen |= ctx->flags;
	kinds_seen |= 1ULL << (ctx->kind & 31);
	priority_seen |= 1ULL << (ctx->priority & 31);
	last.index = ctx->index;
	last.nr = ctx->nr;
	last.cgroup_id = ctx->cgroup_id;
	last.kept_pages = ctx->kept_pages;
	last.keep_max_pages = ctx->keep_max_pages;
	last.node = ctx->node;
	return PAGECACHE_EVICT_KEEP;
}

PAGECACHE_POLICY(keep_all, .init = (void *)keep_all_init, .evict = (void *)keep_all_evict);
