// SPDX-License-Identifier: GPL-2.0-only
/*
 * fail_lent - asks for the next file in a hook that has no open file
 *
 * When to use: must be rejected by the verifier: lent files are for readahead and access.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_EVICT(fail_lent_evict)
(struct pagecache_ctx *ctx)
{
	struct pagecache_file_key next = {};

	return bpf_pagecache_next_file(ctx, &next) > 0 ? PAGECACHE_EVICT_KEEP
						       : PAGECACHE_EVICT_DEFAULT;
}

PAGECACHE_POLICY(fail_lent, .evict = (void *)fail_lent_evict);
