/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * pieces.bpf.h - for policies that remember something about parts of files.
 *
 * A piece is PIECE_PAGES pages of a file, or a whole file that is smaller.  Members of piece_key
 * are named so that user space can fill them in (pagecache_bpf/policy/hint_maps.py).
 */
#ifndef PIECES_BPF_H
#define PIECES_BPF_H

#include "policy.bpf.h"

#define PIECE_SHIFT 20 /* bytes: 1 MiB */

struct piece_key {
	u64 ino;
	u32 dev_major;
	u32 dev_minor;
	u32 generation;
	u32 piece; /* offset / 1 MiB */
};

static __always_inline u64 pages_per_piece(const struct pagecache_ctx *ctx)
{
	return max_u64(1, pages_of(ctx, 1ULL << PIECE_SHIFT));
}

static __always_inline struct piece_key piece_at(const struct pagecache_ctx *ctx, u64 index)
{
	return (struct piece_key){
		.ino = ctx->ino,
		.dev_major = ctx->dev_major,
		.dev_minor = ctx->dev_minor,
		.generation = ctx->generation,
		.piece = (u32)(index / pages_per_piece(ctx)),
	};
}

#define MAX_PIECES_READ 64 /* of one access */

/* Pieces that an access of so many pages from @index on comes to. */
static __always_inline u32 pieces_of(const struct pagecache_ctx *ctx)
{
	u64 pages = pages_per_piece(ctx), first = ctx->index / pages;

	return ctx->nr ? min_u64((ctx->index + ctx->nr - 1) / pages - first + 1, MAX_PIECES_READ)
		       : 0;
}

/* The file as a whole. */
static __always_inline struct piece_key file_key_of(const struct pagecache_ctx *ctx)
{
	struct piece_key key = piece_at(ctx, 0);

	key.piece = ~0U;
	return key;
}

static __always_inline bool same_file(const struct piece_key *a, const struct piece_key *b)
{
	return a->ino == b->ino && a->dev_major == b->dev_major && a->dev_minor == b->dev_minor &&
	       a->generation == b->generation;
}

/*
 * Where a drop behind a reader at @index begins.  Folios are as large as 2 MiB, and one that is not
 * in the range as a whole stays; what has gone before costs nothing.
 */
static __always_inline u64 drop_from(const struct pagecache_ctx *ctx, u64 index)
{
	u64 back = 4 * pages_per_piece(ctx);

	return index > back ? index - back : 0;
}

/* A knob in MiB as a bound of what is kept; 0: the engine's own bound. */
static __always_inline void keep_at_most(struct pagecache_ctx *ctx, u64 mib)
{
	if (mib)
		pagecache_keep_budget(ctx, pages_of(ctx, mib << 20));
}

/* The bound of what is kept, in pages, by a knob in MiB; 0: the engine's (the agent has none). */
static __always_inline u64 keep_bound(const struct pagecache_ctx *ctx, u64 mib)
{
	if (mib)
		return pages_of(ctx, mib << 20);
	return ctx->keep_max_pages ? ctx->keep_max_pages : ~0ULL;
}

#endif /* PIECES_BPF_H */
