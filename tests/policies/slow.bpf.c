// SPDX-License-Identifier: GPL-2.0-only
/*
 * slow - thinks for a long time in one of its hooks
 *
 * When to use: to see that a policy which holds readers or reclaim up is ended.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_KNOB(u32, loops, 1000000, "loops", 0, 8000000, "loops of one answer");
PAGECACHE_KNOB(u32, hook, 6, "enum pagecache_hook", 2, 7, "the hook that is slow");

static u64 sum;

static int think(u32 i, void *data)
{
	sum += i;
	return 0;
}

/* Machines that emulate fast need more of it than one loop may have. */
static __always_inline void think_in(enum pagecache_hook here)
{
	for (int i = 0; hook == here && i < 8; i++)
		bpf_loop(loops, think, NULL, 0);
}

PAGECACHE_READAHEAD(slow_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	think_in(PAGECACHE_HOOK_READAHEAD);
	return PAGECACHE_DEFAULT;
}

PAGECACHE_ACCESS(slow_access)
(struct pagecache_ctx *ctx)
{
	think_in(PAGECACHE_HOOK_ACCESS);
}

PAGECACHE_ADDED(slow_added)
(struct pagecache_ctx *ctx)
{
	think_in(PAGECACHE_HOOK_ADDED);
}

PAGECACHE_REMOVED(slow_removed)
(struct pagecache_ctx *ctx)
{
	think_in(PAGECACHE_HOOK_REMOVED);
}

PAGECACHE_EVICT(slow_evict)
(struct pagecache_ctx *ctx)
{
	think_in(PAGECACHE_HOOK_EVICT);
	return PAGECACHE_EVICT_KEEP;
}

PAGECACHE_PRESSURE(slow_pressure)
(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
	think_in(PAGECACHE_HOOK_PRESSURE);
}

PAGECACHE_POLICY(slow, .readahead = (void *)slow_readahead, .access = (void *)slow_access,
		 .added = (void *)slow_added, .removed = (void *)slow_removed,
		 .evict = (void *)slow_evict, .pressure = (void *)slow_pressure);
