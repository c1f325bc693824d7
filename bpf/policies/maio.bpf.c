// SPDX-License-Identifier: GPL-2.0-only
/*
 * maio - reads ahead in the order of an I/O template, a window ahead of each consumer
 *
 * When to use: loaders whose order is known and is not that of the file: tensor-parallel ranks,
 *	interleaved shards, layers in an order of their own.  The template is derived from the
 *	headers at attach, or made before (pagecache-bpf template).
 * Limits: up to 64 consumers a model.  Engine struct_ops reads ahead in other files of the model
 *	where a session lends them (a load of the controller, of the API or of `run`); else what
 *	comes next in another file waits for its first access.  Drop-behind leaves pages alone
 *	that are still mapped.  Engine agent reads huge pages whole where all of one is wanted,
 *	up to 4 MiB beyond the window.  A file without a template, and one whose template is
 *	wrong too often, is treated as sequential does.  What is evicted first when memory is
 *	short is for engine struct_ops to say: what all consumers have passed; what lies in the
 *	window of one is kept.
 *
 * How: every access is looked up in the template.  It tells where its consumer is; from there the
 * template is followed up to the window's end.  An extent remembers what has been asked for, so
 * ranks that want the same bytes share one prefetch.  A consumer that goes on elsewhere takes
 * its window along: what is still queued is forgotten.  A few pages elsewhere are not enough for
 * that: memcpy() touches the end of a tensor first, and loaders look into all headers before they
 * begin.  Who is which consumer shows by what it reads.
 *	The window grows with what the consumer has read in order since it came to its place, so of
 * what is asked for on behalf of one that reads here and there little is wasted; and it grows
 * more slowly while much of what was asked for before was not read.
 *
 * After the policy MAIO of PPC (Liu et al., FAST '26, pp. 117-132).
 */
#include "policy.bpf.h"
#include "stream.bpf.h"
#include "template_follow.bpf.h"
#include "template_passed.bpf.h"

PAGECACHE_KNOB(u32, window_mib, 64, "MiB", 1, 65536,
	       "ahead of each consumer, in the order of the template");
PAGECACHE_KNOB(u32, accuracy_percent, 50, "percent", 0, 100,
	       "a template that is right less often than this is dropped; 0: never");
PAGECACHE_KNOB(u32, drop_behind, 0, "0 or 1", 0, 1,
	       "1: drop an extent when the last of its consumers has passed it");

/* Computed where it is used: the stack is full enough. */
#define SIZED(bytes) ((u64)(bytes) >> (*(const volatile u32 *)&ctx->page_shift & 31))
#define LOOK_PAGES SIZED(64 << 10) /* a look at what begins somewhere takes no more */
#define SKIP_PAGES SIZED(256 << 10) /* less than this is no gap between two accesses */
#define FIRST_PAGES SIZED(NOW_BYTES) /* read at once on a miss, before the rest follows */
#define LARGE_PAGES \
	SIZED(PAGECACHE_HUGE_BYTES) /* a large folio, of which only the first access is seen */

/* Who was in more places than this since it went on comes to where a step begins by chance. */
#define STRAYS 2

/* Who has come to so many more places than it has gone on reads at random, */
#define RANDOM_PLACES 16
#define RANDOM_PAGES SIZED(8 << 20) /* unless it has read so much in order since */

static __always_inline u64 window_pages(const struct pagecache_ctx *ctx)
{
	return pages_of(ctx, (u64)window_mib << 20);
}

/* How many pages may be read ahead of this consumer. */
static __always_inline u64 ahead_pages(const struct pagecache_ctx *ctx)
{
	return min_u64(window_pages(ctx), pagecache_allowed_ahead(ctx));
}

/* How many pages are read ahead of it: by what it has read in order, and how right that was. */
static __always_inline u64 earned_pages(const struct pagecache_ctx *ctx, const struct place *at)
{
	const struct pagecache_template_model *model = at->model;
	const struct cursor *cursor = at->cursor;
	u64 window = ahead_pages(ctx);

	/* By chance two of its accesses lie side by side, now and then. */
	if (cursor->places > cursor->moves + RANDOM_PLACES && cursor->streak < RANDOM_PAGES)
		return 0;
	if (model->strayed * 8 > model->followed + 8 * start_window(ctx))
		return cursor->streak < SIZED(CONFIRM_BYTES) ? 0 : min_u64(window, cursor->streak);
	if (cursor->first)
		return min_u64(window, 2 * start_window(ctx) + 4 * cursor->streak);
	return cursor->streak < SIZED(CONFIRM_BYTES) ? 0 : min_u64(window, 4 * cursor->streak);
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

LOOP_STEP(try_consumer, CONSUMERS, u32 i, struct consumer_search *search)
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

	LOOP(try_consumer, &search);
	*step = search.step;
	return search.found;
}

static const struct cursor no_cursor = {
	.consumer = PAGECACHE_TEMPLATE_NONE,
	.away = PAGECACHE_TEMPLATE_NONE,
};

/* A process begins: what earlier ones asked for may have been dropped since. */
static __always_inline struct cursor *new_cursor(struct pagecache_ctx *ctx, struct place *at,
						 const struct cursor_key *key)
{
	struct pagecache_template_extent *extent;
	struct pagecache_template_step *step;
	struct cursor *cursor;
	u32 number, consumer;

	consumer = find_consumer(ctx, at, &number);
	if (consumer == PAGECACHE_TEMPLATE_NONE)
		return NULL;
	/* Filled in where it lies: the stack is full enough. */
	bpf_map_update_elem(&template_cursors, key, &no_cursor, BPF_NOEXIST);
	cursor = bpf_map_lookup_elem(&template_cursors, key);
	at->cursor = cursor;
	if (!cursor)
		return NULL;
	cursor->step = number;
	/* What lies before it was not followed: a process can begin anywhere. */
	step = template_step(number);
	extent = template_extent_of(number);
	if (step && extent) {
		cursor->position = step->before;
		if (ctx->index > extent->start)
			cursor->position += ctx->index - extent->start;
		cursor->end = cursor->low = cursor->position;
		cursor->first = !cursor->position;
	}
	begin_load(at, consumer);
	bind(ctx, cursor, consumer);
	return cursor;
}

/* True when much of what was asked for in this file is gone; it will be asked for again. */
static __always_inline bool is_gone(const struct pagecache_ctx *ctx, struct place *at)
{
	u64 there = ctx->resident_pages + ctx->inflight_pages + LARGE_PAGES;

	if (there >= at->target->asked - at->target->asked / 4)
		return false;
	forget(at->target);
	return true;
}

/* Give a template up of which too few pages were read as it says. */
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

/* Whether it is a read of what a step begins with, not by chance, and of more than a look takes. */
static __always_inline bool begins(const struct pagecache_ctx *ctx, const struct cursor *cursor,
				   u32 step)
{
	struct pagecache_template_extent *extent = template_extent_of(step);

	return cursor->strayed <= STRAYS && extent && ctx->kind == PAGECACHE_KIND_READ &&
	       ctx->nr > LOOK_PAGES && ctx->index == extent->start;
}

/*
 * Whether the consumer has gone on there, where its last accesses were: it has read more in order
 * than looks at headers and random reads take, or goes to where a step begins.  A fault is told of,
 * and what is mapped around it, before or after: that is one access.
 */
static __always_inline bool stays_away(const struct pagecache_ctx *ctx, struct place *at, u32 step)
{
	struct cursor *cursor = at->cursor;
	u32 index = ctx->index, end = ctx->index + ctx->nr, file = at->file->file;

	if (cursor->away != PAGECACHE_TEMPLATE_NONE && cursor->away_file == file &&
	    index <= cursor->away_high + SKIP_PAGES && end + SKIP_PAGES >= cursor->away_low) {
		if (end > cursor->away_high) {
			cursor->away_pages += end - max_u64(cursor->away_high, index);
			cursor->away_high = end;
		}
		if (index < cursor->away_low) {
			cursor->away_pages += min_u64(cursor->away_low, end) - index;
			cursor->away_low = index;
		}
	} else {
		at->lost = cursor->away != PAGECACHE_TEMPLATE_NONE;
		cursor->strayed++;
		cursor->places++;
		cursor->away_file = file;
		cursor->away_low = index;
		cursor->away_high = end;
		cursor->away_pages = end - index;
	}
	cursor->away = step;
	return cursor->away_pages >= SIZED(CONFIRM_BYTES) || begins(ctx, cursor, step);
}

/* Where an access lies in relation to what its consumer has accessed. */
enum way { ELSEWHERE, ONWARD, AGAIN, DOWNWARD };

/*
 * Not every access through a mapping is seen, as a huge page (only prefetched pages become one) is
 * mapped as a whole; nor is every access reported where the engine does not report hits.  Where all
 * are, an access beyond the next pages is elsewhere.
 */
static __always_inline enum way way_to(const struct pagecache_ctx *ctx, const struct place *at,
				       const struct pagecache_template_extent *extent, u64 position,
				       u32 step)
{
	struct pagecache_template_extent *own = template_extent_of(at->cursor->step);
	struct cursor *cursor = at->cursor;
	bool fault = ctx->kind != PAGECACHE_KIND_READ;
	bool asked = ctx->index < extent->start + template_asked(extent, at->target);
	/* Of huge pages that are mapped whole nothing is seen, up to where they end. */
	bool wanted = asked || position <= cursor->asked_to + SKIP_PAGES;
	bool seen = PAGECACHE_TELLS_HITS && !fault;

	if (position + ctx->nr > cursor->end && position >= cursor->low &&
	    (position <= cursor->end + SKIP_PAGES || (!seen && wanted)))
		return ONWARD;
	if (position >= cursor->low) {
		/* What is copied at once is gone through downwards, too, and by many threads. */
		u64 back = fault || ctx->tid != cursor->tid ? window_pages(ctx) : SKIP_PAGES;

		return position <= cursor->end && position + back >= cursor->position ? AGAIN
										      : ELSEWHERE;
	}
	if (!fault || !own || template_gone(cursor->step, step) > 0 ||
	    (step != cursor->step && template_gone(cursor->step, step) >= 0))
		return ELSEWHERE;
	/* Below: next to where it was, or where all between was asked for. */
	if (position + ctx->nr + SKIP_PAGES >= cursor->low || asked ||
	    (step + 1 == at->cursor->step && own->file == at->file->file &&
	     template_asked(own, at->target) == own->end - own->start))
		return DOWNWARD;
	return ELSEWHERE;
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
	enum way way;
	bool through, entered = false;
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
		}
	}
	s = template_step(step);
	if (!s)
		return false;
	position = s->before + (ctx->index > extent->start ? ctx->index - extent->start : 0);
	way = *jumped ? ELSEWHERE : way_to(ctx, at, extent, position, step);
	through = is_through(cursor, cursor->step);
	if (way == AGAIN) {
		if (position + SKIP_PAGES >= cursor->position || !is_gone(ctx, at)) {
			cursor->away = PAGECACHE_TEMPLATE_NONE;
			return true;
		}
		way = ELSEWHERE;
	}
	if (way == ELSEWHERE) {
		if (!stays_away(ctx, at, step) && !*jumped)
			return false;
		gone = *jumped ? 0 : template_gone(cursor->step, step);
		*jumped = gone <= 0 || (u64)gone > window_pages(ctx);
		cursor->low =
			min_u64(position, s->before + cursor->away_low > extent->start
						  ? s->before + cursor->away_low - extent->start
						  : s->before);
		cursor->streak = max_u64(*jumped ? 0 : cursor->streak, cursor->away_pages);
		cursor->end = cursor->asked_to = position;
		cursor->first = begins(ctx, cursor, step);
	}
	at->down = way == DOWNWARD;
	cursor->tid = ctx->tid;
	cursor->strayed = 0;
	if (step != cursor->step) {
		entered = !template_same_file(cursor->step, step);
		if (through || (in_order && way == ONWARD))
			passed(ctx, at, cursor->step, drop_behind);
		cursor->step = step;
		cursor->refill = 0;
	}
	cursor->away = PAGECACHE_TEMPLATE_NONE;
	if (at->down) {
		advanced = cursor->low > position ? cursor->low - position : 0;
		cursor->low = min_u64(cursor->low, position);
	} else if (position + ctx->nr > cursor->end) {
		advanced = position + ctx->nr - cursor->end;
		cursor->end = position + ctx->nr;
	}
	cursor->moves += way != ELSEWHERE;
	cursor->streak += way == ELSEWHERE ? 0 : min_u64(advanced, max_u64(ctx->nr, LARGE_PAGES));
	if (!*jumped)
		cursor->pending -= min_u64(cursor->pending, advanced);
	__sync_fetch_and_add(&at->model->followed, way == ELSEWHERE ? ctx->nr : advanced);
	/* It can have begun anew, after its pages were dropped. */
	if ((entered || !in_order) && is_gone(ctx, at))
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

/* Whether the kernel reads ahead there, too: a step's neighbor follows, or it has its own file. */
static __always_inline bool in_file_order(u32 step)
{
	return template_gone(step, step + 1) > 0 || (step && template_gone(step - 1, step) > 0) ||
	       (!template_same_file(step, step + 1) &&
		(!step || !template_same_file(step - 1, step)));
}

PAGECACHE_ACCESS(maio_access)
(struct pagecache_ctx *ctx)
{
	bool created = false, jumped = false, again = false, down;
	struct place at = {};
	u64 window;

	if (pagecache_reads_at_random(ctx) || !find_place(ctx, &at, true, &created))
		return;
	if (!move(ctx, &at, &jumped, &again)) {
		/* The range that mapping tells of can lie between two extents. */
		if (ctx->kind != PAGECACHE_KIND_MAP)
			stray(ctx, &at, at.lost ? max_u64(ctx->nr, FIRST_PAGES) : ctx->nr);
		return;
	}
	if (created && is_gone(ctx, &at))
		at.cursor->load = at.model->load;
	if (jumped && !created) {
		__sync_fetch_and_add(&at.model->jumps, 1);
		if (at.cursor->pending) {
			if (pagecache_cancel(ctx) > 0 || PAGECACHE_KERNEL_READS)
				forget(at.target);
			stray(ctx, &at, at.cursor->pending);
			at.cursor->pending = 0;
		}
	}
	/* It is told of each access, to measure. */
	down = in_file_order(at.cursor->step) &&
	       stands_down(ctx, 0, at.cursor->position, window_pages(ctx));
	window = earned_pages(ctx, &at);
	if (down || !window ||
	    (at.cursor->position < at.cursor->refill && !created && !jumped && !again && !at.down))
		return;
	at.cursor->refill = at.cursor->position + mark_step(ctx, window);
	/* A fault may have come to the middle of a range to go down: not farther than this step. */
	if (at.down || (jumped && !created && ctx->kind != PAGECACHE_KIND_READ))
		descend(ctx, &at, at.down ? window : 1);
	if (!at.down)
		follow(ctx, &at, window, created || jumped || again);
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

PAGECACHE_EVICT(maio_evict)
(struct pagecache_ctx *ctx)
{
	return template_evict(ctx, window_pages(ctx));
}

PAGECACHE_POLICY(maio, .evict = (void *)maio_evict, .readahead = (void *)maio_readahead,
		 .access = (void *)maio_access, .access_step_bytes = 128 << 10,
		 .flags = PAGECACHE_OPS_EVICT_OPTIONAL);
