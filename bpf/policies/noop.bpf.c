// SPDX-License-Identifier: GPL-2.0-only
/*
 * noop - asks for nothing, from every hook
 *
 * When to use: to measure what the framework itself costs: the kernel reads and evicts
 *	exactly as it does without a policy, but every hook is called.
 * Limits: no use for anything else.
 */
#include "policy.bpf.h"

PAGECACHE_READAHEAD(noop_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return PAGECACHE_DEFAULT;
}

PAGECACHE_ACCESS(noop_access)
(struct pagecache_ctx *ctx)
{
}

PAGECACHE_ADDED(noop_added)
(struct pagecache_ctx *ctx)
{
}

PAGECACHE_REMOVED(noop_removed)
(struct pagecache_ctx *ctx)
{
}

PAGECACHE_POLICY(noop, .readahead = (void *)noop_readahead, .access = (void *)noop_access,
		 .added = (void *)noop_added, .removed = (void *)noop_removed);
