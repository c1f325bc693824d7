// SPDX-License-Identifier: GPL-2.0-only
/*
 * fail_init - says no in init
 *
 * When to use: must not stay attached; its code must come back.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_INIT(fail_init_init)
(struct pagecache_ctx *ctx)
{
	return -95; /* EOPNOTSUPP */
}

PAGECACHE_READAHEAD(fail_init_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return PAGECACHE_DEFAULT;
}

PAGECACHE_POLICY(fail_init, .init = (void *)fail_init_init,
		 .readahead = (void *)fail_init_readahead);
