// SPDX-License-Identifier: GPL-2.0-only
/*
 * pin - keeps a model, or the first part of its files, or hot pieces, in the page cache
 *
 * When to use: weights that have to be there when a request comes: a model behind a latency goal,
 *	the first layers of one that starts often, the hot experts of a mixture.  Without mlock:
 *	the pages stay page cache, and no process has to hold them.  `status` compares what is
 *	resident with what is promised and says so when it is less.
 * Limits: it keeps what has been read and reads again what was evicted in spite of it, but it
 *	does not load the model: read it once (cat, vmtouch, the server itself).  What is beyond
 *	the budget is left to the kernel, until a file that has no pages left and was not met for
 *	10 s gives back what it was granted.  Of a file that is pinned in part, what was resident
 *	before is not counted, nor are hot pieces.  Engine agent cannot refuse an eviction: there
 *	pages go and are read again, up to reread_mib_per_s.
 */
#include "pieces.bpf.h"

PAGECACHE_KNOB(u32, budget_mib, 0, "MiB", 0, 1073741824,
	       "memory for what is pinned; 0: all that the engine lets a policy keep");
PAGECACHE_KNOB(u32, first_mib, 0, "MiB", 0, 1073741824, "pin this much of each file; 0: all");
PAGECACHE_KNOB(u32, hot_only, 0, "flag", 0, 1, "1: pin the pieces of the map `hot` only");
PAGECACHE_KNOB(u32, reread_mib_per_s, 64, "MiB/s", 0, 65536,
	       "read again what was evicted, at most this fast; 0: do not");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, 1); /* BPF_F_NO_PREALLOC */
	__type(key, struct piece_key);
	__type(value, u32);
} hot PAGECACHE_HINT("pieces of 1 MiB that are hot; value: 1 pinned, 0 not") SEC(".maps");

PAGECACHE_GAUGE(promised_pages, "pages", "pages that are to stay, of files seen so far");
PAGECACHE_PROMISED(pinned_pages, "pages", promised_pages, "pages of these that are resident");
#define GRANTED promised_pages
#include "grants.bpf.h"

static u64 second, reread; /* pages read again in that second */

static __always_inline u64 wanted_of(const struct pagecache_ctx *ctx)
{
	u64 first = first_mib ? pages_of(ctx, (u64)first_mib << 20) : ctx->file_pages;

	return hot_only ? 0 : min_u64(first, ctx->file_pages);
}

/* Count pages of the granted range that came into the cache; fewer than 0: that left it. */
static __always_inline void count(struct grant *file, s64 pages)
{
	__sync_fetch_and_add(&file->own, pages);
	__sync_fetch_and_add(&pinned_pages, pages);
}

/*
 * What the file has been granted; grant->own: how much of that is resident.  @there: pages of the
 * file that are in the cache already.  Of a file that is pinned in part nobody knows which pages
 * those are, so one gets more when it has none, or all that it wants.
 */
static __always_inline struct grant *file_of(struct pagecache_ctx *ctx, u64 there)
{
	u64 budget = keep_bound(ctx, budget_mib), wanted = wanted_of(ctx), more;
	struct grant *file = grant_find(ctx);

	if (!file) {
		file = grant_new(ctx, wanted, budget, 0);
		if (file && file->pages == ctx->file_pages)
			count(file, min_u64(there, file->pages));
		return file;
	}
	if (!grant_may_ask(ctx, file, wanted) || (there && wanted < ctx->file_pages))
		return file;
	more = grant_take(ctx, wanted - file->pages, budget);
	if (there && file->pages + more < wanted) {
		__sync_fetch_and_add(&promised_pages, -more);
		return file;
	}
	file->pages += more;
	if (there)
		count(file, there - file->own);
	return file;
}

static __always_inline bool is_pinned(struct pagecache_ctx *ctx, const struct grant *file)
{
	struct piece_key key = piece_at(ctx, ctx->index);
	u32 *wanted;

	if (ctx->index < file->pages)
		return true;
	wanted = bpf_map_lookup_elem(&hot, &key);
	return wanted && *wanted;
}

PAGECACHE_INIT(pin_init)
(struct pagecache_ctx *ctx)
{
	keep_at_most(ctx, budget_mib);
	return 0;
}

PAGECACHE_ADDED(pin_added)
(struct pagecache_ctx *ctx)
{
	struct grant *file = file_of(ctx, ctx->resident_pages - ctx->nr);

	if (file && ctx->index < file->pages)
		count(file, ctx->nr);
}

PAGECACHE_REMOVED(pin_removed)
(struct pagecache_ctx *ctx)
{
	struct grant *file = grant_removed(ctx);

	if (!file || !is_pinned(ctx, file))
		return;
	if (ctx->index < file->pages)
		count(file, -ctx->nr);
	/* Only engine agent can read here; the module has refused the eviction before. */
	if (!PAGECACHE_KERNEL_READS || !ctx->file_id)
		return;
	if (ctx->time_ns >> 30 != second) {
		second = ctx->time_ns >> 30;
		reread = 0;
	}
	if (reread < pages_of(ctx, (u64)reread_mib_per_s << 20)) {
		reread += ctx->nr;
		pagecache_prefetch(ctx, ctx->index, ctx->nr, PAGECACHE_NODE_ANY, 0);
	}
}

PAGECACHE_EVICT(pin_evict)
(struct pagecache_ctx *ctx)
{
	struct grant *file = file_of(ctx, ctx->resident_pages);

	return file && is_pinned(ctx, file) ? PAGECACHE_EVICT_KEEP : PAGECACHE_EVICT_DEFAULT;
}

PAGECACHE_POLICY(pin, .init = (void *)pin_init, .added = (void *)pin_added,
		 .removed = (void *)pin_removed, .evict = (void *)pin_evict);
