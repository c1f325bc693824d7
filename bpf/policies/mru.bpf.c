// SPDX-License-Identifier: GPL-2.0-only
/*
 * mru - evicts what was used most recently
 *
 * When to use: data that is scanned from beginning to end, again and again, and does not fit: a
 *	source tree that is searched, a data set read in the same order each epoch.  What was there
 *	first stays and is hit in every round.  A baseline to compare other policies with.
 * Limits: wrong for everything that is used again soon.  It cannot know a round's end.  Engine
 *	agent keeps nothing; it drops what was used last when memory is short.
 */
#include "pieces.bpf.h"

PAGECACHE_KNOB(u32, skip_kib, 512, "KiB", 0, 1048576, "the very last used is left alone");
PAGECACHE_KNOB(u32, recent_mib, 8, "MiB", 1, 1048576, "what was used after that goes first");

#define MAX_PIECES 65536 /* of a file: 64 GiB */

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct piece_key);
	__type(value, u64);
} last_use SEC(".maps");

static u64 used; /* pages, by all accesses so far */

struct reading {
	struct pagecache_ctx *ctx;
	u64 before; /* pages used when it began */
	u32 pieces;
};

/* A piece is used when the access has come to its end, or ends in it. */
LOOP_STEP(use_piece, MAX_PIECES_READ, u32 i, struct reading *reading)
{
	struct pagecache_ctx *ctx = reading->ctx;
	u64 piece = pages_per_piece(ctx), read = (i + 1) * piece - ctx->index % piece;
	u64 at = reading->before + min_u64(read, ctx->nr);
	struct piece_key key = piece_at(ctx, ctx->index + i * piece);

	if (i >= reading->pieces)
		return 1;
	bpf_map_update_elem(&last_use, &key, &at, BPF_ANY);
	return 0;
}

PAGECACHE_ACCESS(mru_access)
(struct pagecache_ctx *ctx)
{
	struct reading reading = { ctx, __sync_fetch_and_add(&used, ctx->nr), pieces_of(ctx) };

	LOOP(use_piece, &reading);
}

static __always_inline bool is_recent(const struct pagecache_ctx *ctx, u64 at)
{
	u64 skip = pages_of(ctx, (u64)skip_kib << 10), age = used - at;

	return age >= skip && age < skip + pages_of(ctx, (u64)recent_mib << 20);
}

PAGECACHE_EVICT(mru_evict)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = piece_at(ctx, ctx->index);
	u64 *at = bpf_map_lookup_elem(&last_use, &key);

	if (!at)
		return PAGECACHE_EVICT_DEFAULT;
	return is_recent(ctx, *at) ? PAGECACHE_EVICT_NOW : PAGECACHE_EVICT_KEEP;
}

struct search {
	struct pagecache_ctx *ctx;
	u64 wanted;
};

LOOP_STEP(drop_recent, MAX_PIECES, u32 i, struct search *search)
{
	struct pagecache_ctx *ctx = search->ctx;
	u64 pages = pages_per_piece(ctx), start = i * pages, *at;
	struct piece_key key = piece_at(ctx, start);

	if (start >= ctx->file_pages || !search->wanted)
		return 1;
	at = bpf_map_lookup_elem(&last_use, &key);
	if (at && is_recent(ctx, *at)) {
		pagecache_drop(ctx, start, pages);
		search->wanted -= min_u64(search->wanted, pages);
	}
	return 0;
}

/*
 * Reclaim comes from the other end, where everything is kept, and can pass over only so much: what
 * goes as a whole here needs not be looked for there.
 */
PAGECACHE_PRESSURE(mru_pressure)
(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
	struct search search = { ctx, want->pages };

	if (!want->round)
		LOOP(drop_recent, &search);
}

PAGECACHE_POLICY(mru, .access = (void *)mru_access, .evict = (void *)mru_evict,
		 .pressure = (void *)mru_pressure);
