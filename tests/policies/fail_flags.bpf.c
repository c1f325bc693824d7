// SPDX-License-Identifier: GPL-2.0-only
/*
 * fail_flags - asks for what the module does not know
 *
 * When to use: must be refused when it is loaded: it has a flag that means nothing yet.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_READAHEAD(fail_flags_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return PAGECACHE_DEFAULT;
}

PAGECACHE_POLICY(fail_flags, .readahead = (void *)fail_flags_readahead, .flags = 1U << 31);
