// SPDX-License-Identifier: GPL-2.0-only
/* kfuncs.c - what a policy can do. */
#include <linux/bpf.h>
#include <linux/btf.h>
#include <linux/btf_ids.h>

#include "compat.h"
#include "prefetch.h"
#include "streams.h"

static struct pcb_call *pcb_call_of(struct pagecache_ctx *ctx)
{
	return container_of(ctx, struct pcb_call, ctx);
}

__bpf_kfunc_start_defs();

/*
 * Read @nr pages from @start into the cache, asynchronously, by a worker of @node
 * (PAGECACHE_NODE_ANY: the reader's).  @mark_step: a readahead marker on the first page and on
 * every @mark_step-th after it; 0: none.  The extent is cut to the file and to the bounds of
 * the module.
 *
 * Return: pages accepted; -EINVAL (this hook has no open file, or the extent lies behind its
 * end), -ENOSPC (the file's queue is full), -EDQUOT (the policy's bound is reached), -ENOMEM.
 */
__bpf_kfunc s64 bpf_pagecache_prefetch(struct pagecache_ctx *ctx, u64 start, u64 nr, s32 node,
				       u32 mark_step)
{
	return pcb_prefetch_queue(pcb_call_of(ctx), start, nr, node, mark_step);
}

/*
 * Drop the clean, unmapped pages of an extent, asynchronously; possible in hooks that have an open
 * file, and in pressure.
 *
 * Return: pages looked at (not: dropped), or an error as above.
 */
__bpf_kfunc s64 bpf_pagecache_drop(struct pagecache_ctx *ctx, u64 start, u64 nr)
{
	return pcb_drop_queue(pcb_call_of(ctx), start, nr);
}

/*
 * Read an extent of another file that this policy governs and that a session lends (sessions.h),
 * for the reader that the hook is about.  As bpf_pagecache_prefetch(), whose arguments are members
 * of @extent here.
 *
 * Return: as there, and -EXDEV: nobody lends the file, or it is not this policy's.
 */
__bpf_kfunc s64 bpf_pagecache_prefetch_file(struct pagecache_ctx *ctx,
					    struct pagecache_file_extent *extent)
{
	struct pagecache_file_extent wish = *extent; /* other programs may be writing to a map */

	return pcb_prefetch_file(pcb_call_of(ctx), &wish);
}

/* Drop an extent of a lent file, as bpf_pagecache_drop() does.  Return: as there, and -EXDEV. */
__bpf_kfunc s64 bpf_pagecache_drop_file(struct pagecache_ctx *ctx,
					struct pagecache_file_extent *extent)
{
	struct pagecache_file_extent wish = *extent;

	return pcb_drop_file(pcb_call_of(ctx), &wish);
}

/*
 * Which file of the same model and policy was lent after the one that the hook is about.
 *
 * Return: its pages, with its identity in @next; 0: there is none; -EINVAL.
 */
__bpf_kfunc s64 bpf_pagecache_next_file(struct pagecache_ctx *ctx, struct pagecache_file_key *next)
{
	return pcb_next_file(pcb_call_of(ctx), next);
}

/* Forget what is queued for this open file.  Return: pages cancelled, or -EINVAL. */
__bpf_kfunc s64 bpf_pagecache_cancel(struct pagecache_ctx *ctx)
{
	struct pcb_call *call = pcb_call_of(ctx);

	return call->file ? pcb_cancel_file(call->file) : -EINVAL;
}

/*
 * Bound the pages that this policy's evict hook may keep; until then it is the module's bound, and
 * never more.  Can be called again at any time: pages above a bound that has fallen are let go of
 * as reclaim comes to them.
 *
 * Return: pages granted.
 */
__bpf_kfunc s64 bpf_pagecache_keep_budget(struct pagecache_ctx *ctx, u64 pages)
{
	return pcb_keep_budget(pcb_call_of(ctx)->policy, pages);
}

/*
 * End this policy: from now on the kernel decides by itself.  @code and @message__str (a string
 * constant) go to the exit record.  In init the attachment fails, with @code if that is an errno.
 */
__bpf_kfunc void bpf_pagecache_exit(struct pagecache_ctx *ctx, s64 code, const char *message__str)
{
	struct pcb_call *call = pcb_call_of(ctx);

	if (call->hook == PAGECACHE_HOOK_INIT) {
		struct pagecache_exit_record *record = &call->policy->record;

		record->kind = PAGECACHE_EXIT_POLICY;
		record->code = code;
		record->hook = PAGECACHE_HOOK_INIT;
		strscpy(record->policy, call->policy->name, sizeof(record->policy));
		strscpy(record->reason, "the policy ended itself in init", sizeof(record->reason));
		strscpy(record->message, message__str, sizeof(record->message));
		return;
	}
	pcb_policy_end(call->policy, PAGECACHE_EXIT_POLICY, code, call->hook,
		       "the policy ended itself", message__str);
}

__bpf_kfunc_end_defs();

BTF_KFUNCS_START(pcb_kfunc_ids)
BTF_ID_FLAGS(func, bpf_pagecache_prefetch, KF_TRUSTED_ARGS)
BTF_ID_FLAGS(func, bpf_pagecache_drop, KF_TRUSTED_ARGS)
BTF_ID_FLAGS(func, bpf_pagecache_prefetch_file, KF_TRUSTED_ARGS)
BTF_ID_FLAGS(func, bpf_pagecache_drop_file, KF_TRUSTED_ARGS)
BTF_ID_FLAGS(func, bpf_pagecache_next_file, KF_TRUSTED_ARGS)
BTF_ID_FLAGS(func, bpf_pagecache_cancel, KF_TRUSTED_ARGS)
BTF_ID_FLAGS(func, bpf_pagecache_keep_budget, KF_TRUSTED_ARGS)
BTF_ID_FLAGS(func, bpf_pagecache_exit, KF_TRUSTED_ARGS)
BTF_KFUNCS_END(pcb_kfunc_ids)

/* Where each may be called; anything else is refused when the policy is loaded. */
#define PCB_HOOK_BITS(hook) BIT(PAGECACHE_HOOK_##hook)
#define PCB_OPEN_FILE_HOOKS (PCB_HOOK_BITS(READAHEAD) | PCB_HOOK_BITS(ACCESS))
static const struct {
	const char *name;
	u32 hooks;
} pcb_kfunc_hooks[] = {
	{ "bpf_pagecache_prefetch", PCB_OPEN_FILE_HOOKS },
	{ "bpf_pagecache_drop", PCB_OPEN_FILE_HOOKS | PCB_HOOK_BITS(PRESSURE) },
	{ "bpf_pagecache_prefetch_file", PCB_OPEN_FILE_HOOKS },
	{ "bpf_pagecache_drop_file", PCB_OPEN_FILE_HOOKS },
	{ "bpf_pagecache_next_file", PCB_OPEN_FILE_HOOKS },
	{ "bpf_pagecache_cancel", PCB_OPEN_FILE_HOOKS },
	{ "bpf_pagecache_keep_budget", U32_MAX },
	{ "bpf_pagecache_exit", U32_MAX },
};

/*
 * The verifier asks whether a program may call a kernel function.  The set below is offered to
 * every struct_ops type, so a program of another type (sched_ext, congestion control) has none of
 * them. Ids of a module's BTF may be relocated when it is loaded: names are compared.
 */
static int pcb_kfunc_filter(const struct bpf_prog *prog, u32 kfunc_id)
{
	const char *name = pcb_kfunc_name(kfunc_id);
	int hook = pcb_hook_of_program(prog);
	unsigned int i;

	if (hook < 0)
		return -EACCES;
	if (!name)
		return 0; /* names cannot be looked up here: what each function checks remains */
	for (i = 0; i < ARRAY_SIZE(pcb_kfunc_hooks); i++) {
		if (!strcmp(name, pcb_kfunc_hooks[i].name))
			return pcb_kfunc_hooks[i].hooks & BIT(hook) ? 0 : -EACCES;
	}
	return -EACCES;
}

static const struct btf_kfunc_id_set pcb_kfunc_set = {
	.owner = THIS_MODULE,
	.set = &pcb_kfunc_ids,
	.filter = pcb_kfunc_filter,
};

int pcb_kfuncs_register(void)
{
	return register_btf_kfunc_id_set(BPF_PROG_TYPE_STRUCT_OPS, &pcb_kfunc_set);
}
