// SPDX-License-Identifier: GPL-2.0-only
/*
 * slow_evict - thinks for a long time about every folio
 *
 * When to use: to see that a policy which holds reclaim up is ended.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_KNOB(u32, loops, 1000000, "loops", 0, 8000000, "loops of one answer");
PAGECACHE_KNOB(u32, hook, 6, "enum pagecache_hook", 6, 7, "the hook that is slow");

static u64 sum;

static int think(u32 i, void *data)
{
	sum += i;
	return 0;
}

PAGECACHE_EVICT(slow_evict_evict)
(struct pagecache_ctx *ctx)
{
	if (hook == PAGECACHE_HOOK_EVICT)
		bpf_loop(loops, think, NULL, 0);
	return PAGECACHE_EVICT_KEEP;
}

PAGECACHE_PRESSURE(slow_evict_pressure)
(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
	/* Machines that emulate fast need more of it than one loop may have. */
	for (int i = 0; hook == PAGECACHE_HOOK_PRESSURE && i < 8; i++)
		bpf_loop(loops, think, NULL, 0);
}

PAGECACHE_POLICY(slow_evict, .evict = (void *)slow_evict_evict,
		 .pressure = (void *)slow_evict_pressure);
