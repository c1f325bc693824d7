/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * policy.bpf.h - all that a policy includes.
 *
 * A policy is one file: a comment with purpose, when to use it and limits; knobs; hooks; and
 * one table that names the hooks.  For example:
 *
 *	PAGECACHE_KNOB(u32, window_kib, 1024, "KiB", 128, 65536, "pages read at once");
 *
 *	PAGECACHE_READAHEAD(simple_readahead)
 *	(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
 *	{
 *		answer->start = ctx->index;
 *		answer->nr = pages_of(ctx, (u64)window_kib << 10);
 *		return PAGECACHE_OVERRIDE;
 *	}
 *
 *	PAGECACHE_POLICY(simple, .readahead = (void *)simple_readahead);
 *
 * What a policy can do:
 *	pagecache_prefetch(ctx, start, nr, node, mark_step)	read pages, asynchronously
 *	pagecache_drop(ctx, start, nr)				drop pages, asynchronously
 *	pagecache_cancel(ctx)					forget what is queued for the file
 *	pagecache_keep_budget(ctx, pages)			bound of what evict may keep
 *	pagecache_exit(ctx, code, "why")			end this policy
 * All but the last return pages, or a negative errno (kmod/kfuncs.c says which).  Policies that
 * know other files (template.bpf.h) can name one; engine struct_ops refuses those that no session
 * lends (PAGECACHE_NOT_LENT, and pagecache_names_files() is false without a session):
 *	pagecache_prefetch_file(ctx, key, pages, start, nr, node)
 *	pagecache_next_file(ctx, key), pagecache_prefetch_next(ctx, start, nr, node, mark_step)
 *	pagecache_drop_file(ctx, key, pages, start, nr)
 */
#ifndef POLICY_BPF_H
#define POLICY_BPF_H

#include "kernel.bpf.h"
#ifndef PAGECACHE_ENGINE_SIMULATE
#include <bpf/bpf_helpers.h>
#endif
#include "pagecache_template.h"

#define PAGECACHE_NOT_LENT -18 /* EXDEV: the engine has no open file to read it through */
#define PAGECACHE_UNKNOWN (~0ULL) /* a number of pages that this engine does not know */

#if defined(PAGECACHE_ENGINE_AGENT) || defined(PAGECACHE_ENGINE_SIMULATE)
#include "pagecache_ops.h"
#else
/*
 * The verifier checks each access to a context member by member; without this the compiler
 * may join two neighbors into one load.
 */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
#include "pagecache_ops.h"
#pragma clang attribute pop
#endif

#ifdef PAGECACHE_ENGINE_SIMULATE
#include "engine_simulate.h"
#define PAGECACHE_CONST /* set while it runs */
#else
#define PAGECACHE_CONST const
#endif

char LICENSE[] SEC("license") = "GPL";

#define PAGECACHE_STR_(x) #x
#define PAGECACHE_STR(x) PAGECACHE_STR_(x)
#define PAGECACHE_NOTE(text) __attribute__((btf_decl_tag("pagecache:" text)))

/*
 * A number that can be set when the policy is attached.  Its unit is part of its name; name,
 * unit, default, bounds and help are read from the object (BTF), there is no other list.
 */
#define PAGECACHE_KNOB(type, name, value, unit, min, max, help)                                  \
	PAGECACHE_CONST volatile type name PAGECACHE_NOTE("unit=" unit)                          \
		PAGECACHE_NOTE("min=" PAGECACHE_STR(min))                                        \
			PAGECACHE_NOTE("max=" PAGECACHE_STR(max)) PAGECACHE_NOTE("help=" help) = \
				value

/*
 * A map that user space writes, or reads (pagecache_bpf/policy/hint_maps.py); stands before
 * SEC(".maps"). Names of its key's and value's members mean something: model, cgroup_id, ino,
 * ..._ns.
 */
#define PAGECACHE_HINT(help) PAGECACHE_NOTE("hint=" help)
#define PAGECACHE_REPORT(help) PAGECACHE_NOTE("report=" help)

/*
 * Gauges: variables that begin with 0 and that `status` shows.  One with a promise must not be
 * smaller than the gauge that the promise names; where it is, `status` says so.
 */
#define PAGECACHE_GAUGE(name, unit, help) \
	u64 name PAGECACHE_NOTE("gauge=" help) PAGECACHE_NOTE("unit=" unit)
#define PAGECACHE_PROMISED(name, unit, promise, help)                       \
	u64 name PAGECACHE_NOTE("gauge=" help) PAGECACHE_NOTE("unit=" unit) \
		PAGECACHE_NOTE("at_least=" PAGECACHE_STR(promise))

static __always_inline struct pagecache_file_key pagecache_key_of(const struct pagecache_ctx *ctx)
{
	return (struct pagecache_file_key){
		.ino = ctx->ino,
		.dev_major = ctx->dev_major,
		.dev_minor = ctx->dev_minor,
		.generation = ctx->generation,
	};
}

static __always_inline bool pagecache_same_file(const struct pagecache_file_key *a,
						const struct pagecache_file_key *b)
{
	return a->ino == b->ino && a->dev_major == b->dev_major && a->dev_minor == b->dev_minor &&
	       a->generation == b->generation;
}

static __always_inline bool pagecache_is_file(const struct pagecache_ctx *ctx,
					      const struct pagecache_file_key *file)
{
	struct pagecache_file_key own = pagecache_key_of(ctx);

	return pagecache_same_file(&own, file);
}

static __always_inline u64 min_u64(u64 a, u64 b)
{
	return a < b ? a : b;
}

static __always_inline u64 max_u64(u64 a, u64 b)
{
	return a > b ? a : b;
}

/* Convert bytes, which knobs are given in, into pages. */
static __always_inline u64 pages_of(const struct pagecache_ctx *ctx, u64 bytes)
{
	return bytes >> (ctx->page_shift & 31);
}

/* A window of more than a quarter of what the reader's cgroup may hold would push itself out. */
static __always_inline u64 pagecache_cgroup_share(const struct pagecache_ctx *ctx)
{
	return ctx->cgroup_pages ? max_u64(ctx->cgroup_pages / 4, 1) : ~0ULL;
}

#ifdef PAGECACHE_ENGINE_AGENT
#include "engine_agent.bpf.h"
#elif defined(PAGECACHE_ENGINE_SIMULATE)
#include "affinity.bpf.h"
#else
#include "engine_struct_ops.bpf.h"
#endif

#define PAGECACHE_INIT(fn) PAGECACHE_HOOK_1(s32, fn, struct pagecache_ctx *)
#define PAGECACHE_EXIT(fn) PAGECACHE_HOOK_1(void, fn, struct pagecache_exit_record *)
#ifndef PAGECACHE_READAHEAD
#define PAGECACHE_READAHEAD(fn) \
	PAGECACHE_HOOK_2(s32, fn, struct pagecache_ctx *, struct pagecache_answer *)
#endif
#define PAGECACHE_ACCESS(fn) PAGECACHE_HOOK_1(void, fn, struct pagecache_ctx *)
#define PAGECACHE_ADDED(fn) PAGECACHE_HOOK_1(void, fn, struct pagecache_ctx *)
#define PAGECACHE_REMOVED(fn) PAGECACHE_HOOK_1(void, fn, struct pagecache_ctx *)
/* Reclaim is about to evict a folio (ctx->index, ctx->nr): returns enum pagecache_eviction. */
#define PAGECACHE_EVICT(fn) PAGECACHE_HOOK_1(s32, fn, struct pagecache_ctx *)
/* Memory is short: answers with pagecache_drop() on the file of ctx. */
#define PAGECACHE_PRESSURE(fn) \
	PAGECACHE_HOOK_2(void, fn, struct pagecache_ctx *, struct pagecache_pressure *)
#define PAGECACHE_POLICY(policy, ...) PAGECACHE_TABLE(policy, __VA_ARGS__)

#endif /* POLICY_BPF_H */
