/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * stream_passed.bpf.h - what readers that stream have passed, and what may go therefore.
 *
 * Streams are followed by open file, and reclaim asks about a page of a file that anybody may have
 * open: so where its readers are is kept by file, too.
 */
#ifndef STREAM_PASSED_BPF_H
#define STREAM_PASSED_BPF_H

#include "stream_find.bpf.h"

#ifdef PAGECACHE_ENGINE_AGENT /* reclaim does not ask there */
static __always_inline void note_place(const struct pagecache_ctx *ctx, struct stream *s, bool down)
{
}

static __always_inline s32 stream_evict(const struct pagecache_ctx *ctx)
{
	return PAGECACHE_EVICT_DEFAULT;
}
#else

#define PLACES 8 /* readers of one file */
#define PLACE_IDLE_NS 2000000000ULL /* who was not heard of for so long reads no more */

struct stream_place {
	u64 file_id; /* whose it is: of this open file, */
	u64 began_ns; /* the stream that has got it then; 0: nobody's */
	u64 low; /* it began here, */
	u64 from; /* has passed what lies before this page, */
	u64 ahead; /* and has been read ahead of up to here */
	u64 window;
	u64 told_ns;
};

struct stream_places {
	struct stream_place places[PLACES];
	u64 victim;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct pagecache_file_key);
	__type(value, struct stream_places);
} places SEC(".maps");

static const struct stream_places no_places;

/* The place of a stream; it gets one when it has none, or has lost it to another stream. */
static __always_inline struct stream_place *own_place(const struct pagecache_ctx *ctx,
						      struct stream *s)
{
	struct pagecache_file_key key = pagecache_key_of(ctx);
	struct stream_places *file = bpf_map_lookup_elem(&places, &key);
	struct stream_place *place;

	if (!file) {
		bpf_map_update_elem(&places, &key, &no_places, BPF_NOEXIST);
		file = bpf_map_lookup_elem(&places, &key);
		if (!file)
			return NULL;
	}
	place = &file->places[s->place % PLACES];
	if (s->began_ns && place->began_ns == s->began_ns && place->file_id == ctx->file_id)
		return place;
	s->began_ns = ctx->time_ns;
	s->place = file->victim++;
	place = &file->places[s->place % PLACES];
	place->file_id = ctx->file_id;
	place->began_ns = s->began_ns;
	return place;
}

/*
 * Takes note of where a stream is.  Of one that goes @down it is not known where the range begins
 * that it goes through: it has passed nothing.
 */
static __always_inline void note_place(const struct pagecache_ctx *ctx, struct stream *s, bool down)
{
	struct stream_place *place = own_place(ctx, s);

	if (!place)
		return;
	place->low = s->low;
	place->from = down ? s->low : ctx->index;
	place->ahead = s->ahead;
	place->window = s->window;
	place->told_ns = ctx->time_ns;
}

/*
 * The kernel keeps what was just read through a mapping, and takes what was read ahead and is not
 * referenced yet.  It is the other way round that nothing is read twice.  A reader may come back by
 * a window, as memcpy() touches the last page of a range first.
 */
static __always_inline s32 stream_evict(const struct pagecache_ctx *ctx)
{
	struct pagecache_file_key key = pagecache_key_of(ctx);
	struct stream_places *file = bpf_map_lookup_elem(&places, &key);
	u64 end = ctx->index + ctx->nr;
	bool passed = false, wanted = false;

	if (!file)
		return PAGECACHE_EVICT_DEFAULT;
	for (int i = 0; i < PLACES; i++) {
		struct stream_place *place = &file->places[i];

		if (!place->began_ns || ctx->time_ns > place->told_ns + PLACE_IDLE_NS)
			continue;
		if (end > place->from && ctx->index < place->ahead)
			return PAGECACHE_EVICT_KEEP;
		if (end + place->window > place->from)
			wanted = true;
		else if (ctx->index >= place->low)
			passed = true;
	}
	return passed && !wanted ? PAGECACHE_EVICT_NOW : PAGECACHE_EVICT_DEFAULT;
}

#endif /* PAGECACHE_ENGINE_AGENT */
#endif /* STREAM_PASSED_BPF_H */
