// SPDX-License-Identifier: GPL-2.0-only
/*
 * maio - reads ahead in the order of an I/O template, a window ahead of each consumer
 *
 * When to use: loaders whose order is known and is not that of the file: tensor-parallel ranks,
 *	interleaved shards, layers in an order of their own.  The template is derived from the
 *	headers at attach, or made before (pagecache-bpf template).
 * Limits: up to 64 consumers a model.  Engine struct_ops reads ahead in the file that is being
 *	read only; what comes next in another file waits for its first access.  Drop-behind
 *	leaves pages alone that are still mapped.  Engine agent reads huge pages whole where all
 *	of one is wanted, up to 4 MiB beyond the window.  A file without a template, and one whose
 *	template is wrong too often, is treated as sequential does.
 *
 * How: every access is looked up in the template.  It tells where its consumer is; from there the
 * template is followed up to the window's end.  An extent remembers what has been asked for, so
 * ranks that want the same bytes share one prefetch.  A consumer that goes on elsewhere takes
 * its window along: what is still queued is forgotten.  One access elsewhere is not enough for
 * that: memcpy() touches the end of a tensor first, and loaders look into all headers before they
 * begin.  Who is which consumer shows by what it reads.
 *
 * After the policy MAIO of PPC (Liu et al., FAST '26, pp. 117-132).
 */
#include "policy.bpf.h"
#include "stream.bpf.h"
#include "template_follow.bpf.h"

PAGECACHE_KNOB(u32, window_mib, 64, "MiB", 1, 65536,
	       "ahead of each consumer, in the order of the template");
PAGECACHE_KNOB(u32, accuracy_percent, 50, "percent", 0, 100,
	       "a template that is right less often than this is dropped; 0: never");
PAGECACHE_KNOB(u32, drop_behind, 0, "0 or 1", 0, 1,
	       "1: drop an extent when the last of its consumers has passed it");

#define CONSUMERS 64 /* of one model that are tried */
#define IDLE_NS 10000000000ULL /* after this a consumer's place can be taken by another process */
#define LOOK_PAGES 16 /* one access elsewhere is no jump if it is of no more */
#define FIRST_PAGES 64 /* read at once on a miss, before the rest follows */

static __always_inline u64 window_pages(const struct pagecache_ctx *ctx)
{
	return pages_of(ctx, (u64)window_mib << 20);
}

/* So far may be read ahead of this consumer. */
static __always_inline u64 ahead_pages(const struct pagecache_ctx *ctx)
{
	return min_u64(window_pages(ctx), pagecache_allowed_ahead(ctx));
}

/* What was asked for may be gone: ask again. */
static __always_inline void forget(struct pagecache_template_target *target)
{
	target->generation++;
	target->asked = 0;
}

static __always_inline u32 span_of(const struct place *at, u32 consumer)
{
	return at->file->spans + consumer - at->model->first_consumer;
}

/* The step of a consumer that an access lies in.  Mapping tells a range around the page only. */
static __always_inline u32 find_step(const struct pagecache_ctx *ctx, const struct place *at,
				     u32 consumer)
{
	u32 step = template_find(span_of(at, consumer), ctx->index);

	if (step == PAGECACHE_TEMPLATE_NONE && ctx->nr > 1)
		step = template_find(span_of(at, consumer), ctx->index + ctx->nr - 1);
	return step;
}

struct consumer_search {
	struct pagecache_ctx *ctx;
	struct place *at;
	u32 found;
	u32 step;
};

static long try_consumer(u32 i, struct consumer_search *search)
{
	struct pagecache_ctx *ctx = search->ctx;
	u32 number = search->at->model->first_consumer + i, step;
	struct pagecache_template_consumer *consumer = consumer_at(number);
	bool taken;

	if (!consumer || i >= search->at->model->nr_consumers)
		return 1;
	taken = consumer->tgid && consumer->tgid != ctx->tgid &&
		ctx->time_ns < consumer->time_ns + IDLE_NS;
	if (taken && search->found != PAGECACHE_TEMPLATE_NONE)
		return 0;
	step = find_step(ctx, search->at, number);
	if (step == PAGECACHE_TEMPLATE_NONE)
		return 0;
	search->found = number;
	search->step = step;
	return !taken;
}

/*
 * A consumer that wants what is accessed: one without a process of its own, or else (again: this
 * process was taken for another one) any.  Its step goes to @step.
 */
static __noinline u32 find_consumer(struct pagecache_ctx *ctx, struct place *at, u32 *step)
{
	struct consumer_search search = { ctx, at, PAGECACHE_TEMPLATE_NONE, 0 };

	bpf_loop(CONSUMERS, try_consumer, &search, 0);
	*step = search.step;
	return search.found;
}

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

/* A process begins: what earlier ones asked for may have been dropped since. */
static __always_inline struct cursor *new_cursor(struct pagecache_ctx *ctx, struct place *at,
						 const struct cursor_key *key)
{
	struct cursor fresh = {
		.consumer = PAGECACHE_TEMPLATE_NONE,
		.away = PAGECACHE_TEMPLATE_NONE,
	};
	struct pagecache_template_step *step;

	fresh.consumer = find_consumer(ctx, at, &fresh.step);
	if (fresh.consumer == PAGECACHE_TEMPLATE_NONE)
		return NULL;
	/* What lies before it was not followed: a process can begin anywhere. */
	step = template_step(fresh.step);
	if (step)
		fresh.position = step->before;
	bpf_map_update_elem(&template_cursors, key, &fresh, BPF_NOEXIST);
	at->cursor = bpf_map_lookup_elem(&template_cursors, key);
	if (at->cursor)
		bind(ctx, at->cursor, fresh.consumer);
	return at->cursor;
}

/* True when much of what was asked for in this file is gone; it will be asked for again. */
static __always_inline bool is_gone(const struct pagecache_ctx *ctx, struct place *at)
{
	u64 there = ctx->resident_pages + ctx->inflight_pages + 512;

	if (there >= at->target->asked - at->target->asked / 4)
		return false;
	forget(at->target);
	return true;
}

/* The accuracy of a template, in pages: those that came as it said against the others. */
static __always_inline void judge(const struct pagecache_ctx *ctx, struct place *at)
{
	struct pagecache_template_model *model = at->model;
	u64 all = model->followed + model->strayed;

	if (accuracy_percent && all >= 4 * window_pages(ctx) &&
	    model->followed * 100 < all * accuracy_percent)
		model->failed = 1;
}

static __always_inline void stray(const struct pagecache_ctx *ctx, struct place *at, u64 pages)
{
	__sync_fetch_and_add(&at->model->strayed, pages);
	judge(ctx, at);
}

/* The consumer has come to the end of a step. */
static __always_inline void passed(struct pagecache_ctx *ctx, u32 step)
{
	struct pagecache_template_extent *extent = template_extent_of(step);
	struct pagecache_template_target *target = extent ? template_target(extent->file) : NULL;
	u64 start, end;

	if (!drop_behind || !target || __sync_fetch_and_add(&extent->passed, 1) + 1 < extent->users)
		return;
	extent->passed = 0;
	extent->asked = 0;
	start = extent->start + !!(extent->edges & PAGECACHE_TEMPLATE_SHARED_FIRST);
	end = extent->end - !!(extent->edges & PAGECACHE_TEMPLATE_SHARED_LAST);
	if (start < end &&
	    pagecache_drop_file(ctx, &target->key, target->pages, start, end - start) > 0)
		target->asked -= min_u64(target->asked, end - start);
}

/*
 * Whether the consumer goes on there, where its last access was, or reads more than a look takes.
 * A fault is told of, and what is mapped around it, before or after: that is one access.
 */
static __always_inline bool stays_away(const struct pagecache_ctx *ctx, struct place *at, u32 step)
{
	struct cursor *cursor = at->cursor;

	if (ctx->kind == PAGECACHE_KIND_READ && ctx->nr > LOOK_PAGES)
		return true;
	if (cursor->away != PAGECACHE_TEMPLATE_NONE && step - cursor->away <= 1) {
		if (ctx->index >= cursor->away_index + LOOK_PAGES ||
		    ctx->index + ctx->nr + LOOK_PAGES <= cursor->away_index)
			return true;
	} else {
		at->lost = cursor->away != PAGECACHE_TEMPLATE_NONE;
		cursor->away_index = ctx->index;
	}
	cursor->away = step;
	return false;
}

/* Set the cursor to where the access is.  Returns false when the template does not have it. */
static __always_inline bool move(struct pagecache_ctx *ctx, struct place *at, bool *jumped,
				 bool *again)
{
	struct cursor *cursor = at->cursor;
	struct pagecache_template_extent *extent = template_extent_of(cursor->step);
	struct pagecache_template_consumer *consumer = consumer_at(cursor->consumer);
	u32 file = at->file->file, step = cursor->step, other;
	struct pagecache_template_step *s;
	u64 position, advanced = 0;
	bool in_order = true;
	s64 gone;

	if (!extent || !consumer)
		return false;
	if (!template_touches(extent, file, ctx->index, ctx->nr)) {
		step = cursor->step + 1;
		extent = step < consumer->first_step + consumer->nr_steps ? template_extent_of(step)
									  : NULL;
		if (!extent || !template_touches(extent, file, ctx->index, ctx->nr)) {
			in_order = false;
			step = find_step(ctx, at, cursor->consumer);
			if (step == PAGECACHE_TEMPLATE_NONE) {
				other = find_consumer(ctx, at, &step);
				if (other == PAGECACHE_TEMPLATE_NONE)
					return false;
				bind(ctx, cursor, other);
				*jumped = true;
			}
			extent = template_extent_of(step);
			if (!extent)
				return false;
			gone = *jumped ? 0 : template_gone(cursor->step, step);
			at->down = gone < 0 && step + 1 == cursor->step;
			if (!at->down &&
			    ctx->index >= extent->start + template_asked(extent, at->target)) {
				if (!*jumped && !stays_away(ctx, at, step))
					return false;
				*jumped = gone <= 0 || (u64)gone > window_pages(ctx);
			}
		}
		if (in_order)
			passed(ctx, cursor->step);
		cursor->step = step;
		cursor->refill = 0;
	}
	cursor->away = PAGECACHE_TEMPLATE_NONE;
	s = template_step(step);
	if (!s)
		return false;
	position = s->before + (ctx->index > extent->start ? ctx->index - extent->start : 0);
	if (position > cursor->position)
		advanced = position - cursor->position;
	if (!*jumped)
		cursor->pending -= min_u64(cursor->pending, advanced);
	/* Of a large folio that is mapped at once only the first access is seen. */
	if (at->down && position < cursor->position)
		advanced = cursor->position - position;
	__sync_fetch_and_add(&at->model->followed,
			     in_order || at->down ? max_u64(advanced, ctx->nr) : ctx->nr);
	/* It can have begun anew, after its pages were dropped. */
	if (!in_order && is_gone(ctx, at))
		*again = true;
	cursor->position = position;
	consumer = consumer_at(cursor->consumer);
	if (consumer) {
		consumer->position = position;
		consumer->time_ns = ctx->time_ns;
	}
	return true;
}

/* Finds template and cursor of an access; false: there are none. */
static __always_inline bool find_place(struct pagecache_ctx *ctx, struct place *at, bool create,
				       bool *created)
{
	struct cursor_key key = { .tgid = ctx->tgid };

	at->file = template_file_of(ctx);
	if (!at->file)
		return false;
	at->model = bpf_map_lookup_elem(&template_models, &at->file->model);
	at->target = template_target(at->file->file);
	if (!at->model || !at->target || at->model->failed)
		return false;
	key.model = at->file->model;
	at->cursor = bpf_map_lookup_elem(&template_cursors, &key);
	if (at->cursor || !create)
		return at->cursor;
	*created = true;
	return new_cursor(ctx, at, &key);
}

PAGECACHE_ACCESS(maio_access)
(struct pagecache_ctx *ctx)
{
	bool created = false, jumped = false, again = false;
	struct place at = {};

	if (!find_place(ctx, &at, true, &created))
		return;
	if (!move(ctx, &at, &jumped, &again)) {
		/* The range that mapping tells of can lie between two extents. */
		if (ctx->kind != PAGECACHE_KIND_MAP)
			stray(ctx, &at, at.lost ? max_u64(ctx->nr, FIRST_PAGES) : ctx->nr);
		return;
	}
	if (created)
		is_gone(ctx, &at);
	if (jumped && !created) {
		__sync_fetch_and_add(&at.model->jumps, 1);
		if (at.cursor->pending) {
			if (pagecache_cancel(ctx) > 0 || PAGECACHE_KERNEL_READS)
				forget(at.target);
			stray(ctx, &at, at.cursor->pending);
			at.cursor->pending = 0;
		}
	}
	if (at.cursor->position < at.cursor->refill && !created && !jumped && !again)
		return;
	at.cursor->refill = at.cursor->position + min_u64(window_pages(ctx) / 4, 512);
	/* A fault may have come to the middle of a range to go down: not farther than this step. */
	if (at.down || (jumped && !created && ctx->kind != PAGECACHE_KIND_READ))
		descend(ctx, &at, at.down ? ahead_pages(ctx) : 1);
	if (!at.down)
		follow(ctx, &at, ahead_pages(ctx), created || jumped || again);
}

PAGECACHE_READAHEAD(maio_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	struct pagecache_template_extent *extent;
	struct place at = {};
	bool created;
	u32 step;

	if (!find_place(ctx, &at, false, &created))
		return stream_readahead(ctx, answer);
	/* The access hook has asked for what comes next. */
	if (PAGECACHE_KERNEL_READS)
		return PAGECACHE_DEFAULT;
	step = template_find(span_of(&at, at.cursor->consumer), ctx->index);
	if (step == PAGECACHE_TEMPLATE_NONE)
		return stream_readahead(ctx, answer);
	if (is_marker(ctx))
		return PAGECACHE_OVERRIDE;
	extent = template_extent_of(step);
	if (!extent)
		return PAGECACHE_DEFAULT;
	if (!ctx->inflight_pages &&
	    ctx->index < extent->start + template_asked(extent, at.target)) {
		/* It was asked for, and is not there. */
		forget(at.target);
		follow(ctx, &at, ahead_pages(ctx), true);
	}
	answer->start = ctx->index;
	answer->nr = max_u64(min_u64(extent->end - ctx->index, FIRST_PAGES), ctx->nr);
	return PAGECACHE_OVERRIDE;
}

PAGECACHE_POLICY(maio, .readahead = (void *)maio_readahead, .access = (void *)maio_access,
		 .access_step_pages = 32);
