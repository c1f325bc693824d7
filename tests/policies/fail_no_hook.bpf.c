// SPDX-License-Identifier: GPL-2.0-only
/*
 * fail_no_hook - decides nothing
 *
 * When to use: must be refused when it is attached: it has no hook.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_INIT(fail_no_hook_init)
(struct pagecache_ctx *ctx)
{
	return 0;
}

PAGECACHE_POLICY(fail_no_hook, .init = (void *)fail_no_hook_init);
