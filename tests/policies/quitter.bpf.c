// SPDX-License-Identifier: GPL-2.0-only
/*
 * quitter - ends itself from the hook that a knob names
 *
 * When to use: to see the exit record of each hook.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_KNOB(u32, quit_hook, 2, "enum pagecache_hook", 0, 7, "the hook that ends the policy");
PAGECACHE_KNOB(s64, quit_code, 4711, "code", -100000, 100000, "code of the exit record");

static __always_inline void quit_in(struct pagecache_ctx *ctx, u32 hook)
{
	if (hook == quit_hook)
		pagecache_exit(ctx, quit_code, "the test asked for it");
}

PAGECACHE_INIT(quitter_init)
(struct pagecache_ctx *ctx)
{
	quit_in(ctx, PAGECACHE_HOOK_INIT);
	return 0;
}

PAGECACHE_READAHEAD(quitter_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	quit_in(ctx, PAGECACHE_HOOK_READAHEAD);
	return PAGECACHE_DEFAULT;
}

PAGECACHE_ACCESS(quitter_access)
(struct pagecache_ctx *ctx)
{
	quit_in(ctx, PAGECACHE_HOOK_ACCESS);
}

PAGECACHE_ADDED(quitter_added)
(struct pagecache_ctx *ctx)
{
	quit_in(ctx, PAGECACHE_HOOK_ADDED);
}

PAGECACHE_REMOVED(quitter_removed)
(struct pagecache_ctx *ctx)
{
	quit_in(ctx, PAGECACHE_HOOK_REMOVED);
}

PAGECACHE_POLICY(quitter, .init = (void *)quitter_init, .readahead = (void *)quitter_readahead,
		 .access = (void *)quitter_access, .added = (void *)quitter_added,
		 .removed = (void *)quitter_removed);
