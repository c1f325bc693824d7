// SPDX-License-Identifier: GPL-2.0-only
/*
 * kvcache - KV-cache files: dropped behind the reader unless wanted soon, within a budget
 *
 * When to use: key/value caches that are spilled to files and read back (SolidAttention, Bidaw):
 *	most of them is read once, and must not push out the weights beside it.  The serving layer
 *	says in the map `next_use` when it needs a piece again.
 *	When memory is short, what nobody wants soon goes first, and then what is wanted last.
 * Limits: what is written stays until it is on the device, whatever the budget; with the module,
 *	until a reader comes by or memory is short.  Ranges that are mapped cannot be dropped
 *	behind; reclaim takes them first.  A piece is 1 MiB.
 */
#include "pieces.bpf.h"

PAGECACHE_KNOB(u32, budget_mib, 256, "MiB", 1, 1073741824, "page cache for these files together");
PAGECACHE_KNOB(u32, horizon_ms, 10000, "ms", 1, 3600000, "wanted within this time is soon");

#define MAX_PIECES 65536 /* of a file: 64 GiB */

struct use {
	u64 due_ns; /* CLOCK_MONOTONIC */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct piece_key);
	__type(value, struct use);
} next_use PAGECACHE_HINT("when a piece of 1 MiB is read next") SEC(".maps");

struct range {
	u64 start;
	u64 nr;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct piece_key);
	__type(value, struct range);
} last_read SEC(".maps");

/* Pages of a piece that are in the cache, as far as they came there while the file was governed. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, 1); /* BPF_F_NO_PREALLOC */
	__type(key, struct piece_key);
	__type(value, u64);
} cached SEC(".maps");

#define PARTS 64 /* of the time within which a piece is wanted soon; a power of 2 */

/* In which part of that time a piece is wanted, from 1 on; 0: not within it. */
static __always_inline u32 part_wanted(const struct pagecache_ctx *ctx, u64 index)
{
	struct piece_key key = piece_at(ctx, index);
	struct use *use = bpf_map_lookup_elem(&next_use, &key);
	u64 horizon = (u64)horizon_ms * 1000000, wait;

	if (!use || use->due_ns < ctx->time_ns)
		return 0;
	wait = use->due_ns - ctx->time_ns;
	return wait < horizon ? 1 + wait / (horizon / PARTS + 1) : 0;
}

static __always_inline bool wanted_soon(const struct pagecache_ctx *ctx, u64 index)
{
	return part_wanted(ctx, index);
}

static __always_inline bool over_budget(const struct pagecache_ctx *ctx)
{
	return ctx->governed_pages > pages_of(ctx, (u64)budget_mib << 20);
}

PAGECACHE_INIT(kvcache_init)
(struct pagecache_ctx *ctx)
{
	keep_at_most(ctx, budget_mib);
	return 0;
}

PAGECACHE_ACCESS(kvcache_access)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = file_key_of(ctx);
	struct range now = { ctx->index, ctx->nr }, last;
	u64 piece = pages_per_piece(ctx);
	struct range *found = bpf_map_lookup_elem(&last_read, &key);

	last = found ? *found : now;
	bpf_map_update_elem(&last_read, &key, &now, BPF_ANY);
	/* The same range read on is not behind yet. */
	if (last.start + last.nr > now.start && last.start < now.start + now.nr)
		return;
	if (!over_budget(ctx) && wanted_soon(ctx, last.start))
		return;
	/* With what lies before it, to cover large folios. */
	now = last;
	for (int i = 0; i < 4; i++) {
		u64 before = now.start > piece ? now.start - piece : 0;

		if (wanted_soon(ctx, before))
			break;
		now.start = before;
	}
	pagecache_drop(ctx, now.start, last.start + last.nr - now.start);
}

PAGECACHE_ADDED(kvcache_added)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = piece_at(ctx, ctx->index);
	u64 piece = pages_per_piece(ctx), none = 0, *pages;

	bpf_map_update_elem(&cached, &key, &none, BPF_NOEXIST);
	pages = bpf_map_lookup_elem(&cached, &key);
	if (pages)
		__sync_fetch_and_add(pages, ctx->nr);
	/* A writer over its budget.  Only engine agent can drop here. */
	if (PAGECACHE_KERNEL_READS && ctx->file_id && ctx->index % piece < ctx->nr &&
	    ctx->index >= 4 * piece && over_budget(ctx) &&
	    !wanted_soon(ctx, ctx->index - 4 * piece))
		pagecache_drop(ctx, ctx->index - 4 * piece, piece);
}

PAGECACHE_REMOVED(kvcache_removed)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = piece_at(ctx, ctx->index);
	u64 *pages = bpf_map_lookup_elem(&cached, &key);

	if (pages && (s64)(__sync_fetch_and_add(pages, -ctx->nr) - ctx->nr) <= 0)
		bpf_map_delete_elem(&cached, &key);
}

PAGECACHE_EVICT(kvcache_evict)
(struct pagecache_ctx *ctx)
{
	return wanted_soon(ctx, ctx->index) ? PAGECACHE_EVICT_KEEP : PAGECACHE_EVICT_NOW;
}

/*
 * How many pages are wanted in which part of the time, by all files that were asked about in round
 * 0 of a shortage.  Its first file shows when the next one begins.  Not static: clang would take
 * them apart, and the kernel refuses type information that says otherwise.
 */
u64 wanted_pages[2 * PARTS];
struct piece_key first_asked;
u32 last_round;

/* Pages that are wanted in a part.  Older verifiers (6.5) lose sight of its bound across a call. */
static __always_inline u64 *wanted_in(u32 part)
{
	asm volatile("" : "+r"(part));
	return &wanted_pages[part & (2 * PARTS - 1)];
}

struct search {
	struct pagecache_ctx *ctx;
	u64 wanted; /* pages */
	u64 known; /* pages of this file that are in the map */
	u32 from; /* pieces that are wanted in this part of the time or later go; 0: the others */
	bool untold; /* those that the map does not have */
};

LOOP_STEP(drop_piece, MAX_PIECES, u32 i, struct search *search)
{
	struct pagecache_ctx *ctx = search->ctx;
	u64 pages = pages_per_piece(ctx), start = i * pages, *told;
	struct piece_key key = piece_at(ctx, start);
	u32 part = part_wanted(ctx, start) & (2 * PARTS - 1);

	if (start >= ctx->file_pages || !search->wanted)
		return 1;
	told = bpf_map_lookup_elem(&cached, &key);
	if (search->untold)
		return !told && !part && pagecache_drop(ctx, start, pages) <= 0;
	if (!told || part > PARTS)
		return 0;
	search->known += *told;
	if (search->from ? part < search->from : part) {
		if (!search->from)
			*wanted_in(part) += *told;
		return 0;
	}
	if (pagecache_drop(ctx, start, pages) <= 0)
		return 1;
	if (search->from)
		*wanted_in(part) -= min_u64(*wanted_in(part), *told);
	search->wanted -= min_u64(search->wanted, *told);
	return 0;
}

static __always_inline void begin_shortage(const struct piece_key *file)
{
	for (int i = 0; i <= PARTS; i++)
		wanted_pages[i] = 0;
	first_asked = *file;
}

/* The part of the time from which on so many pages are wanted, by all files together. */
static __always_inline u32 part_to_give(u64 pages)
{
	u64 sum = 0;

	for (u32 part = PARTS; part > 1; part--) {
		sum += wanted_pages[part];
		if (sum >= pages)
			return part;
	}
	return 1;
}

/*
 * Round 0: what nobody wants soon.  Round 1: what is wanted, the last first, of whichever file.  No
 * more than needed.
 */
PAGECACHE_PRESSURE(kvcache_pressure)
(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
	struct search search = { .ctx = ctx, .wanted = want->pages };
	struct piece_key file = file_key_of(ctx);

	if (!want->round && (last_round || same_file(&file, &first_asked)))
		begin_shortage(&file);
	last_round = want->round;
	if (want->round)
		search.from = part_to_give(want->pages);
	LOOP(drop_piece, &search);
	/* What was in the cache before the file was governed. */
	if (!want->round && search.wanted && ctx->resident_pages > search.known) {
		search.untold = true;
		LOOP(drop_piece, &search);
	}
}

PAGECACHE_POLICY(kvcache, .init = (void *)kvcache_init, .access = (void *)kvcache_access,
		 .added = (void *)kvcache_added, .removed = (void *)kvcache_removed,
		 .evict = (void *)kvcache_evict, .pressure = (void *)kvcache_pressure);
