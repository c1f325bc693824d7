// SPDX-License-Identifier: GPL-2.0-only
/*
 * garbage - answers nonsense from every hook
 *
 * When to use: to see that readers get right bytes whatever a policy says.
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

static __always_inline void act(struct pagecache_ctx *ctx)
{
	u64 r = random_u64();

	pagecache_prefetch(ctx, r % 5 ? r % (ctx->file_pages + 9) : r, r % 3 ? r % 999 : r,
			   (s32)(r % 5) - 2, r % 77);
	if (r % 4 == 0)
		pagecache_drop(ctx, random_u64() % (ctx->file_pages + 9), random_u64() % 999);
	if (r % 16 == 0)
		pagecache_cancel(ctx);
}

PAGECACHE_READAHEAD(garbage_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	u64 r = random_u64();

	act(ctx);
	answer->start = r % 7 ? r % (ctx->file_pages + 1) : r;
	answer->nr = r % 3 ? r % 777 : random_u64();
	answer->mark = random_u64() % 2 ? answer->start + r % 999 : random_u64();
	answer->node = (s32)random_u64();
	answer->order = (u32)random_u64();
	return r % 11 ? PAGECACHE_OVERRIDE : (s32)random_u64();
}

PAGECACHE_ACCESS(garbage_access)
(struct pagecache_ctx *ctx)
{
	act(ctx);
}

PAGECACHE_ADDED(garbage_added)
(struct pagecache_ctx *ctx)
{
	pagecache_keep_budget(ctx, random_u64());
}

PAGECACHE_REMOVED(garbage_removed)
(struct pagecache_ctx *ctx)
{
	pagecache_keep_budget(ctx, random_u64());
}

PAGECACHE_POLICY(garbage, .readahead = (void *)garbage_readahead, .access = (void *)garbage_access,
		 .added = (void *)garbage_added, .removed = (void *)garbage_removed);
