// SPDX-License-Identifier: GPL-2.0-only
/*
 * minimal - the smallest policy: one hook, the kernel's own answer
 *
 * When to use: to see that one hook is enough.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_READAHEAD(minimal_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return PAGECACHE_DEFAULT;
}

PAGECACHE_POLICY(minimal, .readahead = (void *)minimal_readahead);
