/* SPDX-License-Identifier: GPL-2.0-only */
/* engine_struct_ops.bpf.h - hooks become struct_ops programs, actions are the module's kfuncs. */
#ifndef ENGINE_STRUCT_OPS_BPF_H
#define ENGINE_STRUCT_OPS_BPF_H

#include "affinity.bpf.h"
#include "misses_only.bpf.h"

extern s64 bpf_pagecache_prefetch(struct pagecache_ctx *ctx, u64 start, u64 nr, s32 node,
				  u32 mark_step) __ksym;
extern s64 bpf_pagecache_drop(struct pagecache_ctx *ctx, u64 start, u64 nr) __ksym;
extern s64 bpf_pagecache_prefetch_file(struct pagecache_ctx *ctx,
				       struct pagecache_file_extent *extent) __ksym;
extern s64 bpf_pagecache_drop_file(struct pagecache_ctx *ctx,
				   struct pagecache_file_extent *extent) __ksym;
extern s64 bpf_pagecache_next_file(struct pagecache_ctx *ctx,
				   struct pagecache_file_key *next) __ksym;
extern s64 bpf_pagecache_cancel(struct pagecache_ctx *ctx) __ksym;
extern s64 bpf_pagecache_keep_budget(struct pagecache_ctx *ctx, u64 pages) __ksym;
extern void bpf_pagecache_exit(struct pagecache_ctx *ctx, s64 code, const char *message) __ksym;

#define pagecache_drop bpf_pagecache_drop
#define pagecache_cancel bpf_pagecache_cancel
#define pagecache_keep_budget bpf_pagecache_keep_budget
#define pagecache_exit bpf_pagecache_exit

static __always_inline s64 pagecache_prefetch(struct pagecache_ctx *ctx, u64 start, u64 nr,
					      s32 node, u32 mark_step)
{
	if (node == PAGECACHE_NODE_ANY)
		node = consumer_node(ctx->tgid, node);
	return bpf_pagecache_prefetch(ctx, start, nr, node, mark_step);
}

/* A part of a policy: here the kernel's own context cannot be given to a global function. */
#define PAGECACHE_STEP static __always_inline

/* The reader's cgroup is charged, and reclaims for itself. */
static __always_inline u64 pagecache_allowed_ahead(const struct pagecache_ctx *ctx)
{
	return pagecache_cgroup_share(ctx);
}

/* A reader holds its own file only: others can be named where a session lends them. */
static __always_inline bool pagecache_names_files(const struct pagecache_ctx *ctx)
{
	return ctx->flags & PAGECACHE_F_LENT;
}

static __always_inline s64 pagecache_prefetch_file(struct pagecache_ctx *ctx,
						   const struct pagecache_file_key *file, u64 pages,
						   u64 start, u64 nr, s32 node)
{
	struct pagecache_file_extent extent;

	if (pagecache_is_file(ctx, file))
		return pagecache_prefetch(ctx, start, nr, node, 0);
	if (!pagecache_names_files(ctx))
		return PAGECACHE_NOT_LENT;
	if (node == PAGECACHE_NODE_ANY)
		node = consumer_node(ctx->tgid, node);
	extent = (struct pagecache_file_extent){ *file, start, nr, node, 0 };
	return bpf_pagecache_prefetch_file(ctx, &extent);
}

/* The file of the model that was lent after this one; returns its pages, 0 without one. */
static __always_inline u64 pagecache_next_file(struct pagecache_ctx *ctx,
					       struct pagecache_file_key *next)
{
	s64 pages;

	*next = (struct pagecache_file_key){};
	if (!pagecache_names_files(ctx))
		return 0;
	pages = bpf_pagecache_next_file(ctx, next);
	return pages > 0 ? pages : 0;
}

/* Prefetch of that file on behalf of the same reader. */
static __always_inline s64 pagecache_prefetch_next(struct pagecache_ctx *ctx, u64 start, u64 nr,
						   s32 node, u32 mark_step)
{
	struct pagecache_file_extent extent;

	if (!pagecache_next_file(ctx, &extent.file))
		return PAGECACHE_NOT_LENT;
	extent.start = start;
	extent.nr = nr;
	extent.node = node == PAGECACHE_NODE_ANY ? consumer_node(ctx->tgid, node) : node;
	extent.mark_step = mark_step;
	return bpf_pagecache_prefetch_file(ctx, &extent);
}

static __always_inline s64 pagecache_drop_file(struct pagecache_ctx *ctx,
					       const struct pagecache_file_key *file, u64 pages,
					       u64 start, u64 nr)
{
	struct pagecache_file_extent extent;

	if (pagecache_is_file(ctx, file))
		return bpf_pagecache_drop(ctx, start, nr);
	if (!pagecache_names_files(ctx))
		return PAGECACHE_NOT_LENT;
	extent = (struct pagecache_file_extent){ *file, start, nr, PAGECACHE_NODE_ANY, 0 };
	return bpf_pagecache_drop_file(ctx, &extent);
}

/* The kernel hands the arguments over in an array; hooks are written with real ones. */
#define PAGECACHE_HOOK_1(ret, fn, type)                      \
	static __always_inline ret fn##__body(type);         \
	SEC("struct_ops/" #fn) ret fn(__u64 *pagecache_args) \
	{                                                    \
		return fn##__body((type)pagecache_args[0]);  \
	}                                                    \
	static __always_inline ret fn##__body

#define PAGECACHE_HOOK_2(ret, fn, type1, type2)                                        \
	static __always_inline ret fn##__body(type1, type2);                           \
	SEC("struct_ops/" #fn) ret fn(__u64 *pagecache_args)                           \
	{                                                                              \
		return fn##__body((type1)pagecache_args[0], (type2)pagecache_args[1]); \
	}                                                                              \
	static __always_inline ret fn##__body

/* An answer that names no node is read on the node that the reader has given as a hint. */
#define PAGECACHE_READAHEAD(fn)                                                                   \
	static __always_inline s32 fn##__body(struct pagecache_ctx *, struct pagecache_answer *); \
	SEC("struct_ops/" #fn) s32 fn(__u64 *pagecache_args)                                      \
	{                                                                                         \
		struct pagecache_ctx *pagecache_c = (struct pagecache_ctx *)pagecache_args[0];    \
		struct pagecache_answer *pagecache_a =                                            \
			(struct pagecache_answer *)pagecache_args[1];                             \
		s32 pagecache_ret = fn##__body(pagecache_c, pagecache_a);                         \
                                                                                                  \
		if (pagecache_ret == PAGECACHE_OVERRIDE &&                                        \
		    pagecache_a->node == PAGECACHE_NODE_ANY)                                      \
			pagecache_a->node = consumer_node(pagecache_c->tgid, PAGECACHE_NODE_ANY); \
		return pagecache_ret;                                                             \
	}                                                                                         \
	static __always_inline s32 fn##__body

#define PAGECACHE_TABLE(policy, ...)                  \
	SEC(".struct_ops.link")                       \
	struct pagecache_ops policy##_ops = {         \
		__VA_ARGS__,                          \
		.abi_version = PAGECACHE_ABI_VERSION, \
		.name = #policy,                      \
	}

#endif /* ENGINE_STRUCT_OPS_BPF_H */
