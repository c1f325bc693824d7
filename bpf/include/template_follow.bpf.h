/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * template_follow.bpf.h - where consumers are in their template, and asking for what comes next.
 *
 * A consumer's steps are asked for from where it is up to the end of its window; of one that goes
 * down through a range, as many below it.  An extent remembers what has been asked for.  Needs
 * stream.bpf.h, for the budget.
 */
#ifndef TEMPLATE_FOLLOW_BPF_H
#define TEMPLATE_FOLLOW_BPF_H

#include "template.bpf.h"

#define CONSUMERS 64 /* of one model that are tried */
#define IDLE_NS 10000000000ULL /* after this a consumer's place can be taken by another process */
#define TOP_UP_STEPS 64 /* extents that one access can ask for */

struct cursor_key {
	u32 tgid;
	u32 model;
};

struct cursor {
	u32 consumer;
	u32 step; /* it is in this step, */
	u64 position; /* here, */
	u64 end; /* and has accessed what comes before this; */
	u64 low; /* from here on, since it came to this place */
	u64 streak; /* pages that it has accessed in order since */
	u64 refill; /* the window is topped up when it comes to this position */
	u64 pending; /* pages asked for on its behalf and not reached yet */
	u64 asked_to; /* from its place on all up to this position was asked for */
	/* These two are of one access; here, as the verifier would count one on the stack, which is
	 * full. */
	u64 room; /* left by the budget */
	u32 all; /* 1: steps of all files are gone through; 0: those of this file only */
	u32 tid; /* the thread that has come farthest */
	u32 away; /* the step of its last accesses, if it may have jumped there; */
	u32 away_file; /* they were in this file, */
	u32 away_low; /* from this page */
	u32 away_high; /* to that, */
	u32 away_pages; /* so many pages */
	u32 first; /* 1: it began where its order or a step begins */
	u32 strayed; /* it was in so many places since it went on */
	u32 load; /* what was asked for before this load is gone */
	u32 places; /* all that it has come to out of order, */
	u32 moves; /* and its accesses in order */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct cursor_key);
	__type(value, struct cursor);
} template_cursors SEC(".maps");

/* How far a process has asked, in one file or (where it can) in all. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct cursor_key);
	__type(value, u32);
} template_aheads SEC(".maps");

/* What one access is about. */
struct place {
	struct pagecache_template_file *file;
	struct pagecache_template_model *model;
	struct pagecache_template_target *target; /* of the accessed file */
	struct cursor *cursor;
	bool lost; /* its accesses are in one place after the other */
	bool down; /* it has come from above, in the same range */
};

static __always_inline struct pagecache_template_consumer *consumer_at(u32 number)
{
	return bpf_map_lookup_elem(&template_consumers, &number);
}

/* This process is that consumer, and no other one any more. */
static __always_inline void bind(const struct pagecache_ctx *ctx, struct cursor *cursor, u32 number)
{
	struct pagecache_template_consumer *consumer = consumer_at(cursor->consumer);

	if (consumer && consumer->tgid == ctx->tgid)
		consumer->tgid = 0;
	cursor->consumer = number;
	consumer = consumer_at(number);
	if (consumer)
		consumer->tgid = ctx->tgid;
}

/* What was asked for may be gone: ask again. */
static __always_inline void forget(struct pagecache_template_target *target)
{
	target->generation++;
	target->asked = 0;
}

/*
 * A file that the consumer of this cursor may ask for.  If what an earlier load had asked for was
 * gone where this one began, it may be gone in any file of the model.
 */
static __always_inline struct pagecache_template_target *target_for(const struct cursor *cursor,
								    u32 number)
{
	struct pagecache_template_target *target = template_target(number);

	if (target && target->load < cursor->load) {
		target->load = cursor->load;
		forget(target);
	}
	return target;
}

struct follow {
	struct pagecache_ctx *ctx;
	struct cursor *cursor;
	u64 limit; /* the window ends at this position */
	u64 huge; /* pages of a huge page, where it pays to read whole ones; else 0 */
	u32 number; /* of the step that is next */
	u32 last; /* behind the consumer's last one */
};

/* From the consumer's place, so far. */
static __always_inline struct follow follow_from(struct pagecache_ctx *ctx, struct cursor *cursor,
						 u64 window, u64 limit)
{
	u64 huge = pages_of(ctx, PAGECACHE_HUGE_BYTES);

	cursor->room = room_in_budget(ctx);
	cursor->all = pagecache_names_files(ctx);
	return (struct follow){
		.ctx = ctx,
		.cursor = cursor,
		.limit = limit,
		.huge = PAGECACHE_KERNEL_READS && window >= 4 * huge ? huge : 0,
		.number = cursor->step,
	};
}

/* Ask for pages of an extent.  Returns how many of them will be there, or an error. */
static __always_inline s64 ask(struct follow *f, u32 number,
			       const struct pagecache_template_target *target, u64 start, u64 end)
{
	u64 range = f->huge ? template_range(number, start, end, f->huge) : start | end << 32;
	u64 from = (u32)range, to = range >> 32, room = f->cursor->room;
	s64 got;

	if (from >= to)
		return end - start;
	if (to - from > room) {
		from = max_u64(from, start);
		to = min_u64(to, from + room);
	}
	got = pagecache_prefetch_file(f->ctx, &target->key, target->pages, from, to - from,
				      PAGECACHE_NODE_ANY);
	if (got <= 0)
		return got;
	f->cursor->room -= got;
	if (from + got < range >> 32)
		end = min_u64(from + got, end);
	return end > start ? end - start : 0;
}

/* Take note that so many more pages of the extent have been asked for. */
static __always_inline void asked(struct follow *f, struct pagecache_template_extent *extent,
				  struct pagecache_template_target *target, u64 start, u64 got)
{
	f->cursor->pending += got;
	target->asked += got;
	extent->asked = start + got - extent->start;
	extent->generation = target->generation;
}

/* Ask for what is missing of one step.  Returns 1 when there is no more to ask for. */
LOOP_STEP(follow_step, TOP_UP_STEPS, u32 i, struct follow *f)
{
	struct pagecache_template_step *step = template_step(f->number);
	struct pagecache_template_extent *extent;
	struct pagecache_template_target *target;
	struct pagecache_ctx *ctx = f->ctx;
	u64 start, end;
	s64 got;

	if (!step || f->number >= f->last || step->before >= f->limit || !f->cursor->room)
		return 1;
	extent = template_extent(step->extent);
	target = extent ? target_for(f->cursor, extent->file) : NULL;
	if (!target)
		return 1;
	start = extent->start + template_asked(extent, target);
	/* The pages of this access are read by the kernel itself. */
	if (f->number == f->cursor->step && start < ctx->index + ctx->nr)
		start = min_u64(ctx->index + ctx->nr, extent->end);
	end = min_u64(extent->end, extent->start + (f->limit - step->before));
	/* A part of a huge page cannot become one. */
	if (f->huge && end < extent->end)
		end &= ~(f->huge - 1);
	if (start < end) {
		got = ask(f, step->extent, target, start, end);
		/* A file that cannot be named waits for its first access; those behind it do not.
		 */
		if (got == PAGECACHE_NOT_LENT && f->cursor->all) {
			f->number++;
			return 0;
		}
		if (got <= 0)
			return 1;
		asked(f, extent, target, start, got);
		start += got;
	}
	f->cursor->asked_to = max_u64(f->cursor->asked_to, step->before + start - extent->start);
	if (start < extent->end)
		return 1;
	if (!f->cursor->all && step->next == PAGECACHE_TEMPLATE_NONE)
		return 1;
	f->number = f->cursor->all ? f->number + 1 : step->next;
	return 0;
}

/*
 * Ask for what is missing of the window.  In the order of the template, in all its files where
 * the engine can name them, else in the one that is accessed.
 */
static __noinline int follow(struct pagecache_ctx *ctx, struct place *at, u64 window, bool jumped)
{
	struct cursor *cursor = at->cursor;
	struct pagecache_template_consumer *consumer = consumer_at(cursor->consumer);
	struct follow f = follow_from(ctx, cursor, window, cursor->position + window);
	struct cursor_key key = { .tgid = ctx->tgid };
	u32 *ahead;

	if (!consumer)
		return 0;
	key.model = cursor->all ? ~at->file->model : at->file->file;
	ahead = bpf_map_lookup_elem(&template_aheads, &key);
	f.last = consumer->first_step + consumer->nr_steps;
	if (ahead && !jumped && *ahead > f.number && *ahead < f.last)
		f.number = *ahead;
	LOOP(follow_step, &f);
	bpf_map_update_elem(&template_aheads, &key, &f.number, BPF_ANY);
	return 0;
}

struct descent {
	struct follow f;
	u64 pages;
};

/* Ask for the next step below. */
LOOP_STEP(descend_step, TOP_UP_STEPS, u32 i, struct descent *d)
{
	struct pagecache_template_step *step = template_step(d->f.number);
	struct pagecache_template_extent *extent = step ? template_extent(step->extent) : NULL;
	struct pagecache_template_target *target =
		extent ? target_for(d->f.cursor, extent->file) : NULL;
	u64 start;
	s64 got;

	if (!target || !d->f.cursor->room ||
	    (d->f.number != d->f.cursor->step &&
	     template_gone(d->f.cursor->step, d->f.number) >= 0))
		return 1;
	start = extent->start + template_asked(extent, target);
	d->pages += extent->end - extent->start;
	if (start < extent->end) {
		got = ask(&d->f, step->extent, target, start, extent->end);
		if (got < (s64)(extent->end - start))
			return 1;
		asked(&d->f, extent, target, start, got);
	}
	return d->pages >= d->f.limit || d->f.number-- <= d->f.last;
}

/* The consumer goes down through a range: ask for a window below it, the nearest part first. */
static __noinline int descend(struct pagecache_ctx *ctx, struct place *at, u64 window)
{
	struct cursor *cursor = at->cursor;
	struct pagecache_template_consumer *consumer = consumer_at(cursor->consumer);
	struct descent d = { .f = follow_from(ctx, cursor, window, window) };

	if (!consumer)
		return 0;
	d.f.last = consumer->first_step + 1;
	LOOP(descend_step, &d);
	return 0;
}

#endif /* TEMPLATE_FOLLOW_BPF_H */
