// SPDX-License-Identifier: GPL-2.0-only
/*
 * noop - leaves everything to the kernel
 *
 * When to use: to measure what the framework itself costs: the kernel reads and evicts
 *	exactly as it does without a policy, but the policy is asked about readahead and told of
 *	every page that enters or leaves the cache.
 * Limits: no use for anything else.  It has no access hook, whose cost on each cached read
 *	a policy takes upon itself (benchmarks/overhead.py measures it apart).
 */
#include "policy.bpf.h"

PAGECACHE_READAHEAD(noop_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return PAGECACHE_DEFAULT;
}

PAGECACHE_ADDED(noop_added)
(struct pagecache_ctx *ctx)
{
}

PAGECACHE_REMOVED(noop_removed)
(struct pagecache_ctx *ctx)
{
}

PAGECACHE_POLICY(noop, .readahead = (void *)noop_readahead, .added = (void *)noop_added,
		 .removed = (void *)noop_removed);
