// SPDX-License-Identifier: GPL-2.0-only
/*
 * keep_none - takes the place of keep_all, and has another hook
 *
 * When to use: to see what becomes of what a policy kept when its successor does not evict.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_READAHEAD(keep_none_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return PAGECACHE_DEFAULT;
}

PAGECACHE_POLICY(keep_all, .readahead = (void *)keep_none_readahead);
