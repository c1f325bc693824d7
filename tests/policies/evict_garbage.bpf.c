// SPDX-License-Identifier: GPL-2.0-only
/*
 * evict_garbage - answers nonsense when memory is short
 *
 * When to use: to see that it is counted, changes nothing, and ends the policy.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

static u64 state = 88172645463325252ULL;

static __always_inline u64 random_u64(void)
{
	u64 x = state;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	state = x;
	return x;
}

PAGECACHE_EVICT(evict_garbage_evict)
(struct pagecache_ctx *ctx)
{
	u64 r = random_u64();

	pagecache_keep_budget(ctx, random_u64());
	return r % 3 ? (s32)random_u64() : (s32)(r % 5);
}

PAGECACHE_PRESSURE(evict_garbage_pressure)
(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
	u64 r = random_u64();

	pagecache_drop(ctx, r % 5 ? r % (ctx->file_pages + 9) : r, r % 3 ? r % 999 : r);
}

PAGECACHE_POLICY(evict_garbage, .evict = (void *)evict_garbage_evict,
		 .pressure = (void *)evict_garbage_pressure);
