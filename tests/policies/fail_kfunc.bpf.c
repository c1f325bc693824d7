// SPDX-License-Identifier: GPL-2.0-only
/*
 * fail_kfunc - prefetches in a hook that has no open file
 *
 * When to use: must be rejected by the verifier: prefetch needs readahead or access.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_EVICT(fail_kfunc_evict)
(struct pagecache_ctx *ctx)
{
	pagecache_prefetch(ctx, 0, 64, PAGECACHE_NODE_ANY, 0);
	return PAGECACHE_EVICT_DEFAULT;
}

PAGECACHE_POLICY(fail_kfunc, .evict = (void *)fail_kfunc_evict);
