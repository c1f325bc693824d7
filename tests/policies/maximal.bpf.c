// SPDX-License-Identifier: GPL-2.0-only
/*
 * maximal - defines every hook, reads every field, uses every action
 *
 * When to use: to have each signature and kfunc verified.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

/* Read by the test: what each hook has seen. */
u64 seen[PAGECACHE_HOOK_NR];
u64 fields;
s64 prefetched, dropped, cancelled;
struct pagecache_ctx last[PAGECACHE_HOOK_NR];

static __always_inline void note(const struct pagecache_ctx *ctx, u32 hook)
{
	__sync_fetch_and_add(&seen[hook], 1);
#define KEEP(field) last[hook].field = ctx->field
	KEEP(ino);
	KEEP(file_id);
	KEEP(index);
	KEEP(nr);
	KEEP(file_pages);
	KEEP(resident_pages);
	KEEP(governed_pages);
	KEEP(inflight_pages);
	KEEP(time_ns);
	KEEP(cgroup_id);
	KEEP(dev_major);
	KEEP(dev_minor);
	KEEP(generation);
	KEEP(model);
	KEEP(kind);
	KEEP(flags);
	KEEP(tgid);
	KEEP(tid);
	KEEP(node);
	KEEP(ra_pages);
	KEEP(io_pages);
	KEEP(page_shift);
#undef KEEP
}

PAGECACHE_INIT(maximal_init)
(struct pagecache_ctx *ctx)
{
	note(ctx, PAGECACHE_HOOK_INIT);
	return 0;
}

PAGECACHE_EXIT(maximal_exit)
(struct pagecache_exit_record *record)
{
	__sync_fetch_and_add(&seen[PAGECACHE_HOOK_EXIT], 1);
	fields += record->kind + record->hook + record->code + record->seq + record->time_ns +
		  record->policy[0] + record->reason[0] + record->message[0];
}

PAGECACHE_READAHEAD(maximal_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	note(ctx, PAGECACHE_HOOK_READAHEAD);
	answer->start = ctx->index;
	answer->nr = 64;
	answer->mark = ctx->index + 32;
	answer->node = ctx->node;
	answer->order = 2;
	prefetched = pagecache_prefetch(ctx, ctx->index + 64, 64, PAGECACHE_NODE_ANY, 32);
	return PAGECACHE_OVERRIDE;
}

PAGECACHE_ACCESS(maximal_access)
(struct pagecache_ctx *ctx)
{
	note(ctx, PAGECACHE_HOOK_ACCESS);
	if (ctx->index >= 1024) {
		dropped = pagecache_drop(ctx, 0, 16);
		cancelled = pagecache_cancel(ctx);
	}
}

PAGECACHE_ADDED(maximal_added)
(struct pagecache_ctx *ctx)
{
	note(ctx, PAGECACHE_HOOK_ADDED);
}

PAGECACHE_REMOVED(maximal_removed)
(struct pagecache_ctx *ctx)
{
	note(ctx, PAGECACHE_HOOK_REMOVED);
}

PAGECACHE_POLICY(maximal, .init = (void *)maximal_init, .exit = (void *)maximal_exit,
		 .readahead = (void *)maximal_readahead, .access = (void *)maximal_access,
		 .added = (void *)maximal_added, .removed = (void *)maximal_removed);
