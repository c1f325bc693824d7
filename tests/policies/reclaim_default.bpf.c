// SPDX-License-Identifier: GPL-2.0-only
/*
 * reclaim_default - has both hooks of reclaim and leaves everything to the kernel
 *
 * When to use: to measure what being asked costs.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_EVICT(reclaim_default_evict)
(struct pagecache_ctx *ctx)
{
	return PAGECACHE_EVICT_DEFAULT;
}

PAGECACHE_PRESSURE(reclaim_default_pressure)
(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
}

PAGECACHE_POLICY(reclaim_default, .evict = (void *)reclaim_default_evict,
		 .pressure = (void *)reclaim_default_pressure);
