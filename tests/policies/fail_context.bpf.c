// SPDX-License-Identifier: GPL-2.0-only
/*
 * fail_context - writes to its context
 *
 * When to use: must be rejected by the verifier: only the answer can be written.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_READAHEAD(fail_context_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	ctx->index = 0;
	return PAGECACHE_DEFAULT;
}

PAGECACHE_POLICY(fail_context, .readahead = (void *)fail_context_readahead);
