/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * stream.bpf.h - finds readers that stream and keeps a growing window ahead of each.
 *
 * What the policy sequential is made of, and what others fall back to.
 *
 * A few accesses in order make a stream; from then on a window is kept ahead of it, with
 * readahead markers that tell where the reader has come to.  A marker that is reached before
 * its data has arrived means that the reader waits: the window doubles, until that no longer
 * makes the reader faster, which is what the device can take.  A model whose files have been
 * streamed to their ends is trusted: a window is kept from the first access on.  So is a consumer
 * with a node hint: what it reads before it is found to stream would lie on its own node.
 */
#ifndef STREAM_BPF_H
#define STREAM_BPF_H

#include "standby.bpf.h"
#include "stream_find.bpf.h"
#include "stream_passed.bpf.h"

static __always_inline void open_window(struct stream *s, const struct pagecache_ctx *ctx,
					u64 pages)
{
	s->window = min_u64(pages, largest_window(ctx));
	s->since = ctx->index;
	s->since_ns = ctx->time_ns;
}

/*
 * The reader had to wait.  Judge the present window once it has been read through: while each
 * growth makes the reader faster by an eighth or more, grow it again.  One that did not is tried
 * again when the reader has gone on for PROBE_BYTES: a device has slow moments.  It goes back to
 * what it was if that does not help either.
 */
PAGECACHE_STEP int grow(struct stream *s, const struct pagecache_ctx *ctx)
{
	u64 limit, pages, ns, rate;
	bool steep;

	if (!s || !ctx)
		return 0;
	limit = largest_window(ctx);
	pages = ctx->index - s->since;
	ns = ctx->time_ns - s->since_ns;
	steep = s->window < pages_of(ctx, STEEP_BYTES);
	if (ctx->index < s->since + s->window || !ns ||
	    (s->window >= limit && s->settled != PROBING))
		return 0;
	rate = pages * 1000000000ULL / ns;
	if (s->settled == SETTLED) {
		if (pages < pages_of(ctx, PROBE_BYTES))
			return 0;
		s->settled = PROBING;
		s->proven = s->window;
	} else if (!steep && s->rate && rate < s->rate + s->rate / 8) {
		open_window(s, ctx, s->settled == PROBING ? s->proven : s->window);
		s->settled = SETTLED;
		return 0;
	} else {
		s->settled = 0;
	}
	s->rate = rate;
	open_window(s, ctx, s->window * (steep ? 4 : 2));
	return 0;
}

/*
 * The page is absent although it was asked for, and no prefetch is in flight: what was read has
 * been dropped since, and the reader goes through the file again.
 */
static __always_inline bool starts_again(const struct stream *s, const struct pagecache_ctx *ctx)
{
	return s->window && !is_marker(ctx) && ctx->index >= s->low && ctx->index < s->ahead &&
	       !ctx->inflight_pages;
}

/*
 * A reader comes to a stream that has not shown yet that it goes on, or begins one.  Returns
 * whether so many have begun in the model since a reader was there that it is met by chance: in a
 * model of one file it would have been replaced by them.
 */
static __always_inline bool meet(struct stream *s, const struct pagecache_ctx *ctx, bool begins)
{
	struct model_state *model = model_of(ctx);
	bool stale;

	if (!model)
		return false;
	model->begun += begins;
	stale = model->begun - s->begun > STREAMS;
	s->begun = model->begun;
	return stale;
}

static __always_inline void trust(const struct pagecache_ctx *ctx, const struct stream *s)
{
	struct model_state *model = model_of(ctx);

	if (!model)
		return;
	model->window = s->window;
	if (model->streamed < TRUSTED)
		model->streamed++;
}

static __always_inline u64 start_window(const struct pagecache_ctx *ctx)
{
	return pages_of(ctx, (u64)start_window_kib << 10);
}

/*
 * The window that a new stream has at once; 0: it has to show first that it is one.  Of a file that
 * is trusted it may be no more than a look at the header, unless the reader comes from the file
 * before (head), or misses only are told of.
 */
static __always_inline u64 first_window(const struct pagecache_ctx *ctx,
					const struct model_state *model, u64 head)
{
	/* A fault tells least of where its reader goes. */
	if (model && model->streamed >= TRUSTED)
		return head || !PAGECACHE_TELLS_HITS
			       ? model->window
			       : min_u64(model->window,
					 start_window(ctx) / (is_fault(ctx) ? 4 : 1));
	if (model && !is_marker(ctx) && consumer_is_known(ctx->tgid))
		return start_window(ctx);
	return 0;
}

/*
 * Whether the reader has accessed too little of the range that its stream has covered to be one
 * that streams: random readers, too, come upon what was read ahead for them.  Of a file that is
 * mapped in huge pages only one part of 16 is seen.
 */
static __always_inline bool skips(const struct stream *s, struct pagecache_ctx *ctx)
{
	u64 seen = pagecache_touched(ctx), part = is_fault(ctx) ? SEEN_PART : READ_PART;
	u64 enough = is_fault(ctx) ? pages_of(ctx, SEEN_BYTES) : pages_of(ctx, CONFIRM_BYTES);

	return seen != PAGECACHE_UNKNOWN && s->moved > enough &&
	       (seen - s->touched) * part < s->moved;
}

/*
 * Markers lie a quarter of a small window apart, an eighth of a large one: each makes a request,
 * which costs CPU time.
 */
static __always_inline u64 mark_step(const struct pagecache_ctx *ctx, u64 window)
{
	u64 small = min_u64(max_u64(window / 4, pages_of(ctx, LEAST_STEP_BYTES)),
			    pages_of(ctx, SMALL_STEP_BYTES));

	return max_u64(small, min_u64(window / 8, pages_of(ctx, MOST_STEP_BYTES)));
}

/*
 * Whether a reader of a mapping goes here and there within its window instead of on, which is told
 * of at the next mark.  One that goes on may not be seen for as long as it meets huge pages, which
 * begin where they are aligned; and memcpy() touches the last page of a range first.
 */
static __always_inline bool jumps(struct stream *s, const struct pagecache_ctx *ctx)
{
	u64 slack = near_pages(ctx), huge = pages_of(ctx, PAGECACHE_HUGE_BYTES);
	u64 next = s->next + mark_step(ctx, s->window) + slack;

	if (!PAGECACHE_TELLS_HITS || !is_fault(ctx) || !(ctx->index & (huge - 1)) ||
	    (ctx->index + slack >= s->from && ctx->index <= next))
		s->jumped = 0;
	else
		s->jumped++;
	return s->jumped >= JUMPS;
}

/*
 * While a window grows to its size it is bounded by how much the reader has read in order, so that
 * little is wasted on a reader that turns out to read at random.
 */
static __always_inline void widen(struct stream *s, const struct pagecache_ctx *ctx, bool down)
{
	u64 pages = down ? min_u64(s->from - ctx->index, pages_of(ctx, PAGECACHE_HUGE_BYTES))
			 : ctx->index - min_u64(s->from, ctx->index);

	s->moved += s->jumped ? 0 : pages;
	if (s->window < s->goal)
		open_window(s, ctx, max_u64(s->window, min_u64(s->goal, 4 * s->moved)));
}

static __always_inline u64 room_in_budget(const struct pagecache_ctx *ctx)
{
	u64 budget = pages_of(ctx, (u64)budget_mib << 20);
	u64 used = ctx->governed_pages + ctx->inflight_pages;

	if (!budget)
		return ~0ULL;
	return used < budget ? budget - used : 0;
}

/*
 * The window reaches beyond the end of the file: into the next one, if this model is streamed.  One
 * that is no larger than the window is asked for as a whole: its parts would be small requests,
 * each of them as late as its reader has come.
 */
static __noinline int go_on(struct pagecache_ctx *ctx, struct stream *s, u64 room)
{
	struct pagecache_file_key next;
	u64 pages = pagecache_next_file(ctx, &next), left = ctx->file_pages - ctx->index;
	struct model_state *model = pages ? model_of(ctx) : NULL;
	u64 want, head, step;
	s64 accepted;

	if (!s || !model || model->streamed < TRUSTED || s->window <= left)
		return 0;
	step = mark_step(ctx, s->window);
	want = min_u64(s->window - left, pages);
	if (want < pages)
		want &= ~(pages_of(ctx, PAGECACHE_HUGE_BYTES) - 1);
	if (pages <= s->window && left + pages <= largest_window(ctx))
		want = pages;
	model->window = s->window; /* it may have grown since this file was asked for */
	head = pagecache_same_file(&model->next, &next) ? model->head : 0;
	if (want <= head || (want - head < step && want < pages))
		return 0;
	accepted = pagecache_prefetch_next(ctx, head, min_u64(want - head, room),
					   PAGECACHE_NODE_ANY, step);
	if (accepted <= 0)
		return 0;
	model->next = next;
	model->head = head + accepted;
	return 0;
}

/* Ask for what is missing of the window. */
static __always_inline void top_up(struct pagecache_ctx *ctx, struct stream *s, u64 room)
{
	u64 end = min_u64(ctx->index + s->window, ctx->file_pages);
	u64 step = mark_step(ctx, s->window);
	u64 huge = pages_of(ctx, PAGECACHE_HUGE_BYTES);
	s64 accepted;

	if (s->ahead < ctx->index)
		s->ahead = ctx->index;
	/* A part of a huge page cannot become one. */
	if (end < ctx->file_pages && s->window >= 2 * huge)
		end &= ~(huge - 1);
	/* Nor is a rest of the file one: its reader would wait for it alone. */
	if (ctx->file_pages - end < step && ctx->file_pages - ctx->index <= largest_window(ctx))
		end = ctx->file_pages;
	/* Small pieces would only make small requests of the device. */
	if (s->ahead >= end || (end - s->ahead < step && end < ctx->file_pages))
		return;
	accepted = pagecache_prefetch(ctx, s->ahead, min_u64(end - s->ahead, room),
				      PAGECACHE_NODE_ANY, step);
	if (accepted <= 0)
		return;
	s->ahead += accepted;
	if (s->ahead >= ctx->file_pages)
		trust(ctx, s);
}

/* Answer with the last NOW_BYTES up to the page, or the page alone if it was asked for already. */
static __always_inline void answer_down(const struct pagecache_ctx *ctx, struct stream *s,
					struct pagecache_answer *answer)
{
	answer->start = ctx->index;
	if (ctx->index <= s->low) {
		answer->start -= min_u64(ctx->index, pages_of(ctx, NOW_BYTES) - 1);
		s->low = answer->start;
	}
	answer->nr = ctx->index + ctx->nr - answer->start;
}

struct way_down {
	struct pagecache_ctx *ctx;
	u64 low; /* the window ends here */
	u64 part; /* pages of one request */
	u64 room;
	u64 from; /* asked for from here on */
	u32 step; /* from one mark to the next */
};

LOOP_STEP(ask_below, DOWN_PARTS, u32 i, struct way_down *way)
{
	u64 start, nr;

	if (way->from <= way->low)
		return 1;
	start = way->from > way->low + way->part ? way->from - way->part : way->low;
	nr = way->from - start;
	if (nr > way->room ||
	    pagecache_prefetch(way->ctx, start, nr, PAGECACHE_NODE_ANY, way->step) < (s64)nr)
		return 1;
	way->room -= nr;
	way->from = start;
	return 0;
}

/*
 * Ask for what is missing of the window below a reader that goes down through a range, the nearest
 * part first.  Where the range begins is not known; what lies before it has been read.
 */
static __noinline int go_down(struct pagecache_ctx *ctx, struct stream *s, u64 room)
{
	struct way_down way = { .ctx = ctx, .room = room };

	if (!s)
		return 0;
	way.from = s->low;
	way.low = ctx->index > s->window ? ctx->index - s->window : 0;
	way.part = max_u64(s->window / DOWN_PARTS, pages_of(ctx, LEAST_STEP_BYTES));
	way.step = mark_step(ctx, s->window);
	if (way.low + way.part > s->low && way.low)
		return 0;
	LOOP(ask_below, &way);
	s->low = way.from;
	if (way.from <= way.low)
		s->window = min_u64(2 * s->window, max_u64(s->window, 4 * s->moved));
	s->window = min_u64(s->window, largest_window(ctx));
	return 0;
}

static __always_inline s32 stream_readahead(struct pagecache_ctx *ctx,
					    struct pagecache_answer *answer)
{
	struct file_state *file;
	struct model_state *model;
	struct stream *s;
	bool down = false;
	u64 room, window, moved, head = 0;

	/* First of all: who is left to the kernel pays for no more than this. */
	if (stands_down(ctx, ctx->ino, ctx->index, largest_window(ctx)))
		return PAGECACHE_DEFAULT;
	file = file_of(ctx);
	if (!file)
		return PAGECACHE_DEFAULT;
	s = stream_at(file, ctx);
	if (!s) {
		model = is_marker(ctx) || ctx->index < pages_of(ctx, HEAD_BYTES) ? model_of(ctx)
										 : NULL;
		/*
		 * It may lie in what this reader's window has reached of its next file: a marker,
		 * or a page that is still to be read.
		 */
		if (model && pagecache_is_file(ctx, &model->next) &&
		    (is_marker(ctx) || (!PAGECACHE_TELLS_HITS && ctx->inflight_pages)))
			head = model->head;
		if (is_marker(ctx) && ctx->index >= head)
			return PAGECACHE_DEFAULT;
		s = &file->streams[file->victim++ % STREAMS];
		begin(s, ctx);
		meet(s, ctx, true);
		window = first_window(ctx, model, head);
		if (window) {
			s->goal = max_u64(window, model ? model->window : 0);
			open_window(s, ctx, window);
			s->ahead = max_u64(s->ahead, head);
			model->head = 0; /* its reader may come again */
		}
	} else {
		if (starts_again(s, ctx)) {
			s->ahead = ctx->index;
			open_window(s, ctx, s->window);
		}
		if (!s->window && meet(s, ctx, false)) {
			begin(s, ctx);
			meet(s, ctx, false);
		}
		moved = moves_on(s, ctx);
		down = is_fault(ctx) && ctx->index < s->from;
		if (s->window && (skips(s, ctx) || jumps(s, ctx))) {
			begin(s, ctx);
			pagecache_forget_reader(ctx);
			return PAGECACHE_DEFAULT;
		}
		if (s->window)
			widen(s, ctx, down);
		count(s, ctx, moved);
	}
	if (!s->window) {
		if (!confirmed(s, ctx)) {
			s->ahead = max_u64(s->ahead, ctx->index + kernel_reads(ctx));
			return PAGECACHE_DEFAULT;
		}
		s->goal = start_window(ctx);
		open_window(s, ctx, PAGECACHE_TELLS_HITS ? min_u64(s->goal, s->moved) : s->goal);
	}
	room = room_in_budget(ctx);
	if (!room)
		return PAGECACHE_DEFAULT;
	/* The reader needs what is answered now, the rest can follow. */
	if (down) {
		if (!is_marker(ctx))
			answer_down(ctx, s, answer);
		if (!s->jumped)
			go_down(ctx, s, room);
		note_place(ctx, s, true);
		return PAGECACHE_OVERRIDE;
	}
	if (!is_marker(ctx) || (ctx->flags & PAGECACHE_F_LATE))
		grow(s, ctx);
	if (!is_marker(ctx) && PAGECACHE_KERNEL_READS) {
		/* What its own readahead brings is not asked for. */
		s->ahead =
			max_u64(s->ahead, ctx->index + max_u64(kernel_reads(ctx), ctx->ra_pages));
	} else if (!is_marker(ctx)) {
		answer->start = ctx->index;
		answer->nr = min_u64(max_u64(ctx->nr, pages_of(ctx, NOW_BYTES)), s->window);
		s->ahead = max_u64(s->ahead, ctx->index + answer->nr);
	}
	/* What has jumped may go on from here, or is about to jump again. */
	if (s->jumped)
		return PAGECACHE_OVERRIDE;
	top_up(ctx, s, room);
	note_place(ctx, s, false);
	if (s->ahead >= ctx->file_pages)
		go_on(ctx, s, room);
	return PAGECACHE_OVERRIDE;
}

#endif /* STREAM_BPF_H */
