/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * template_passed.bpf.h - what consumers have passed in a load, and what may go therefore.  Needs
 * stream.bpf.h, for files without a template.
 *
 * A load is what the consumers of a model read from the time that one of them begins anew.  What
 * all that want it have passed is dropped, if the policy says so, and is evicted first.
 */
#ifndef TEMPLATE_PASSED_BPF_H
#define TEMPLATE_PASSED_BPF_H

#include "bits.bpf.h"
#include "template_follow.bpf.h"

/* A process begins as a consumer: if that has read in the present load, this is the next one. */
static __always_inline void begin_load(const struct place *at, u32 number)
{
	struct pagecache_template_consumer *consumer = consumer_at(number);
	struct pagecache_template_model *model = at->model;

	if (!consumer)
		return;
	if (consumer->load == model->load && consumer->position)
		model->load++;
	consumer->load = model->load;
	consumer->position = 0;
}

/* Takes note that the cursor's consumer has passed an extent; true: all that want it have now. */
static __always_inline bool all_passed(const struct place *at,
				       struct pagecache_template_extent *extent)
{
	u64 bit = 1ULL << ((at->cursor->consumer - at->model->first_consumer) & 63);

	/* What an earlier load has left (it may have been broken off) says nothing of this one. */
	if (extent->load != at->model->load) {
		extent->load = at->model->load;
		extent->passed = 0;
	}
	if (extent->passed & bit)
		return false;
	__sync_fetch_and_or(&extent->passed, bit);
	return count_bits(extent->passed) >= extent->users;
}

/* The consumer has come to the end of a step.  @drop: what all have passed is dropped. */
static __always_inline void passed(struct pagecache_ctx *ctx, const struct place *at, u32 step,
				   bool drop)
{
	struct pagecache_template_extent *extent = template_extent_of(step);
	struct pagecache_template_target *target = extent ? template_target(extent->file) : NULL;
	u64 start, end;

	if (!drop || !target || !all_passed(at, extent))
		return;
	extent->asked = 0;
	start = extent->start + !!(extent->edges & PAGECACHE_TEMPLATE_SHARED_FIRST);
	end = extent->end - !!(extent->edges & PAGECACHE_TEMPLATE_SHARED_LAST);
	if (start < end &&
	    pagecache_drop_file(ctx, &target->key, target->pages, start, end - start) > 0)
		target->asked -= min_u64(target->asked, end - start);
}

/* Whether the cursor's consumer has accessed all of a step since it came to its place. */
static __always_inline bool is_through(const struct cursor *cursor, u32 step)
{
	struct pagecache_template_extent *extent = template_extent_of(step);
	struct pagecache_template_step *s = template_step(step);

	return extent && s && cursor->low <= s->before &&
	       cursor->end >= s->before + extent->end - extent->start;
}

struct eviction {
	struct pagecache_ctx *ctx;
	struct pagecache_template_file *file;
	struct pagecache_template_model *model;
	u64 window;
	bool behind; /* a consumer has passed the page, */
	bool inside; /* it lies in the window of one, */
	bool ahead; /* or farther on in the order of one */
};

/* Where the page lies for one consumer. */
LOOP_STEP(judge_page, CONSUMERS, u32 i, struct eviction *e)
{
	struct pagecache_template_consumer *consumer = consumer_at(e->model->first_consumer + i);
	struct pagecache_template_extent *extent;
	struct pagecache_template_step *s;
	u64 position;
	u32 step;

	if (!consumer || i >= e->model->nr_consumers)
		return 1;
	step = template_find(e->file->spans + i, e->ctx->index);
	s = template_step(step);
	extent = template_extent_of(step);
	if (!s || !extent)
		return 0;
	position = s->before + e->ctx->index - min_u64(extent->start, e->ctx->index);
	if (!consumer->tgid || consumer->load != e->model->load) {
		e->ahead = true; /* it has not begun */
	} else if (position + e->ctx->nr <= consumer->position) {
		e->behind = true;
	} else if (e->ctx->time_ns > consumer->time_ns + IDLE_NS) {
		return 0; /* it has gone */
	} else if (position < consumer->position + e->window) {
		e->inside = true;
		return 1;
	} else {
		e->ahead = true;
	}
	return 0;
}

/*
 * The kernel keeps what was just read through a mapping, and takes what was read ahead and is not
 * referenced yet.  It is the other way round that nothing is read twice.
 */
static __always_inline s32 template_evict(struct pagecache_ctx *ctx, u64 window)
{
	struct eviction e = { .ctx = ctx, .file = template_file_of(ctx) };

	if (!e.file)
		return stream_evict(ctx);
	e.model = bpf_map_lookup_elem(&template_models, &e.file->model);
	if (!e.model || e.model->failed)
		return stream_evict(ctx);
	e.window = window;
	LOOP(judge_page, &e);
	if (e.inside)
		return PAGECACHE_EVICT_KEEP;
	return e.behind && !e.ahead ? PAGECACHE_EVICT_NOW : PAGECACHE_EVICT_DEFAULT;
}

#endif /* TEMPLATE_PASSED_BPF_H */
