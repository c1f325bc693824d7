// SPDX-License-Identifier: GPL-2.0-only
/*
 * fail_bounds - writes behind its answer
 *
 * When to use: must be rejected by the verifier.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_READAHEAD(fail_bounds_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	volatile u64 *behind = (volatile u64 *)(answer + 1);

	*behind = 1;
	return PAGECACHE_DEFAULT;
}

PAGECACHE_POLICY(fail_bounds, .readahead = (void *)fail_bounds_readahead);
