// SPDX-License-Identifier: GPL-2.0-only
/*
 * flood - asks for more than anyone can carry out
 *
 * When to use: to test that requests that find no room are counted.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_ACCESS(flood_access)
(struct pagecache_ctx *ctx)
{
	for (int i = 0; i < 256; i++)
		pagecache_drop(ctx, i, 1);
}

PAGECACHE_POLICY(flood, .access = (void *)flood_access);
