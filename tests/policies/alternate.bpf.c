// SPDX-License-Identifier: GPL-2.0-only
/*
 * alternate - keeps, lets go and leaves alone by turns, whatever the folio
 *
 * When to use: to see that no order of answers confuses reclaim or the accounting of what is kept.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

static u64 turn;

PAGECACHE_EVICT(alternate_evict)
(struct pagecache_ctx *ctx)
{
	return __sync_fetch_and_add(&turn, 1) % 3;
}

PAGECACHE_PRESSURE(alternate_pressure)
(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
	if (__sync_fetch_and_add(&turn, 1) % 2)
		pagecache_drop(ctx, turn % (ctx->file_pages + 1), want->pages);
}

PAGECACHE_POLICY(alternate, .evict = (void *)alternate_evict,
		 .pressure = (void *)alternate_pressure);
