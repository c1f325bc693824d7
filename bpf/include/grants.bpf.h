/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * grants.bpf.h - the parts of a budget that files have been given.
 *
 * Files get theirs in the order in which they are met.  Nobody tells a policy that a file has gone
 * (deleted, replaced by the next checkpoint); but a file that has gone has no pages in the cache.
 * So when the budget is used up, files without pages that nobody has met for a while give theirs
 * back.  A file that has got less than it wants asks again now and then.
 *
 * Before this header a policy defines GRANTED, the name of the gauge with the sum of all grants.
 */
#ifndef GRANTS_BPF_H
#define GRANTS_BPF_H

#include "pieces.bpf.h"

#define GRANT_IDLE_NS 10000000000ULL /* a file that was not met for so long may have gone */
#define GRANT_RETRY_NS 1000000000ULL /* between two looks for such files, or two requests */

struct grant {
	u64 pages; /* of the file, from the first, that are granted */
	u64 resident; /* pages of the file in the cache, when it was met last */
	u64 met_ns;
	u64 asked_ns; /* when it asked for more */
	u64 own; /* the policy's */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, 1); /* BPF_F_NO_PREALLOC */
	__type(key, struct piece_key);
	__type(value, struct grant);
} grants SEC(".maps");

static u64 grants_looked_ns;

struct grant_search {
	u64 now;
	u64 found; /* pages */
};

static long grant_give_back(void *map, const struct piece_key *key, struct grant *grant,
			    struct grant_search *search)
{
	struct piece_key gone = *key;

	if (grant->resident || search->now < grant->met_ns + GRANT_IDLE_NS)
		return 0;
	search->found += grant->pages;
	grant->pages = 0;
	bpf_map_delete_elem(&grants, &gone);
	return 0;
}

/* Takes back what files have that are gone; not more often than once a second. */
static __always_inline void grants_collect(const struct pagecache_ctx *ctx)
{
	struct grant_search search = { .now = ctx->time_ns };

	if (ctx->time_ns < grants_looked_ns + GRANT_RETRY_NS)
		return;
	grants_looked_ns = ctx->time_ns;
	bpf_for_each_map_elem(&grants, grant_give_back, &search, 0);
	__sync_fetch_and_add(&GRANTED, -search.found);
}

/* What is left of the budget, up to @wanted; it is the caller's now. */
static __always_inline u64 grant_take(const struct pagecache_ctx *ctx, u64 wanted, u64 budget)
{
	u64 granted = GRANTED;

	if (granted + wanted > budget) {
		grants_collect(ctx);
		granted = GRANTED;
	}
	wanted = granted < budget ? min_u64(wanted, budget - granted) : 0;
	__sync_fetch_and_add(&GRANTED, wanted);
	return wanted;
}

static __always_inline struct grant *grant_find(const struct pagecache_ctx *ctx)
{
	struct piece_key key = file_key_of(ctx);
	struct grant *grant = bpf_map_lookup_elem(&grants, &key);

	if (grant) {
		grant->resident = ctx->resident_pages;
		grant->met_ns = ctx->time_ns;
	}
	return grant;
}

/* A file is met for the first time.  NULL: there is no room, or another CPU was faster. */
static __always_inline struct grant *grant_new(const struct pagecache_ctx *ctx, u64 wanted,
					       u64 budget, u64 own)
{
	struct piece_key key = file_key_of(ctx);
	struct grant fresh = {
		.resident = ctx->resident_pages,
		.met_ns = ctx->time_ns,
		.asked_ns = ctx->time_ns,
		.own = own,
	};

	fresh.pages = grant_take(ctx, wanted, budget);
	if (!bpf_map_update_elem(&grants, &key, &fresh, BPF_NOEXIST))
		return bpf_map_lookup_elem(&grants, &key);
	__sync_fetch_and_add(&GRANTED, -fresh.pages);
	return NULL;
}

/* Whether a file that wants more than it has may ask for it now. */
static __always_inline bool grant_may_ask(const struct pagecache_ctx *ctx, struct grant *grant,
					  u64 wanted)
{
	if (grant->pages >= wanted || ctx->time_ns < grant->asked_ns + GRANT_RETRY_NS)
		return false;
	grant->asked_ns = ctx->time_ns;
	return true;
}

/*
 * Pages of the file leave the cache.  The kernel takes those of a deleted file out in batches, and
 * counts a batch when it has told of all in it: so they are counted here, too.  NULL: the file has
 * not been met.
 */
static __always_inline struct grant *grant_removed(const struct pagecache_ctx *ctx)
{
	struct piece_key key = file_key_of(ctx);
	struct grant *grant = bpf_map_lookup_elem(&grants, &key);
	u64 there;

	if (!grant)
		return NULL;
	there = min_u64(grant->resident, ctx->resident_pages);
	grant->resident = there - min_u64(ctx->nr, there);
	grant->met_ns = ctx->time_ns;
	return grant;
}

#endif /* GRANTS_BPF_H */
