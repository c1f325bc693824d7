// SPDX-License-Identifier: GPL-2.0-only
/*
 * evict_all - lets every folio go, also those that are in use
 *
 * When to use: to see that files which are being read and mapped survive it.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_EVICT(evict_all_evict)
(struct pagecache_ctx *ctx)
{
	return PAGECACHE_EVICT_NOW;
}

PAGECACHE_POLICY(evict_all, .evict = (void *)evict_all_evict);
