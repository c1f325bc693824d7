/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * standby.bpf.h - whether reading ahead is worth it.
 *
 * With a read_ahead_kb of some MiB the kernel by itself keeps many devices busy, and so does a
 * reader of several threads whose reads are large.  What a policy adds then is work for the CPUs
 * that the reader needs.  So there each reader is first left to the kernel, and how fast it reads
 * and how much of its time it waits is measured.  That is how it stays as long as it comes near to
 * what the device can do, or hardly waits.  If it does not, the policy tries for a while, and goes
 * on only as long as that is faster; it tries again later, and later again.
 *
 * Where the kernel's readahead is shallow a reader is helped almost from its beginning on: unless
 * it shows in its first few MiB that it comes near to what the device can do, as one does whose
 * reads are large, it is only left to the kernel for a moment now and then.  If it is as fast by
 * itself, which one is that needs all CPUs, it stays so, and so does whoever reads the model next,
 * until the policy tries again.
 *
 * Only engine agent measures: what a task has run is not told to the module's policies, and there
 * the kernel's readahead is replaced.
 */
#ifndef STANDBY_BPF_H
#define STANDBY_BPF_H

#include "policy.bpf.h"
#include "bits.bpf.h"

#ifdef PAGECACHE_ENGINE_AGENT

#define DEEP_BYTES (4 << 20) /* a readahead of so much is deep */
#define LOOK_BYTES (32 << 20) /* read between two looks */
#define MAX_ALONE_BYTES (16ULL << 30)
#define PROOF_BYTES (256ULL << 20) /* with the policy's help, until it has to show again */
#define FIRST_BYTES (8 << 20) /* a reader begins; the next so much shows how fast it is, */
#define FIRST_NS 50000000 /* if it comes so far in that time */
#define SHORT_FILES_PER_S 500 /* a file that takes its device less is over before help has come */
#define LIKE_PERCENT 75 /* of each other's speed: two readers that read alike */
#define WAITS_PERCENT 10 /* of its time; a reader that waits less gains nothing */
#define ENOUGH_PERCENT 70 /* of the device's speed: little is left to gain */
#define READ_PERCENT 50 /* of one that begins to read(), and copies: help takes its CPU */
#define MAPPED_PERCENT 85 /* of a reader of a mapping, whose faults become fewer with help, too */
#define LESS_PERCENT 10 /* below these: one that became so slow is not near the device's speed */
#define GAIN_PERCENT 125 /* of the speed without it, in a short try */
#define KEEP_PERCENT 110 /* and later on */
#define NEAR_PERCENT 90 /* of the device's speed: whether it is as fast alone is not asked */
#define SLOW_TIMES 3 /* a look that lasts so many times as long as one with help says enough */
#define LATER_TIMES 8 /* after a moment alone that was slower, the next comes so much later */
#define RECENT 8 /* accesses whose threads are told apart */

#include "standby_state.bpf.h"

static __always_inline void standby_enter(struct standby *it, u32 state, u64 pages)
{
	it->standing_down = state == STANDBY_ALONE;
	it->as_fast = 0;
	it->state = state;
	it->left_pages = pages;
	it->looks = it->pages = it->ns = it->waited_ns = it->best_pages_per_s = 0;
}

static __always_inline void standby_look(struct standby *it, const struct pagecache_ctx *ctx,
					 u64 ino, u64 place)
{
	it->tid = ctx->tid;
	it->ino = ino;
	it->place = place;
	it->since_ns = ctx->time_ns;
	it->busy_ns = pagecache_reader_busy_ns();
	it->file = ctx->ino;
	it->resident_pages = ctx->resident_pages;
	it->settled = !ctx->inflight_pages;
}

/* How fast the reader was in the looks of this state that count, in pages a second. */
static __always_inline u64 standby_rate(const struct standby *it)
{
	return it->pages * 1000000000ULL / max_u64(it->ns, 1);
}

static __always_inline bool standby_leaves(const struct standby *it)
{
	return it->standing_down || it->state == STANDBY_CHECKING || it->state == STANDBY_FIRST;
}

/* The speed of the device of this file, in pages a second; 0: not known. */
static __always_inline u64 device_speed(const struct pagecache_ctx *ctx)
{
	struct pagecache_file_key key = pagecache_key_of(ctx);
	struct pagecache_agent_tag *tag = bpf_map_lookup_elem(&tags, &key);

	return tag ? pages_of(ctx, (u64)tag->device_mib_s << 20) : 0;
}

static __always_inline void standby_help(struct standby *it, const struct pagecache_ctx *ctx)
{
	standby_enter(it, STANDBY_HELPING, it->proof_pages + 2 * pages_of(ctx, LOOK_BYTES));
}

/*
 * What a reader begins with, and begins with anew where the kernel's readahead has changed.  Of one
 * with a node hint the first pages would lie on its own node.
 */
static __always_inline void standby_restart(struct standby *it, const struct standby_model *model,
					    const struct pagecache_ctx *ctx)
{
	it->pause_pages = model->pause_pages;
	it->proof_pages = pages_of(ctx, PROOF_BYTES);
	it->device_pages_per_s = device_speed(ctx);
	it->began_ns = ctx->time_ns;
	it->first_pages_per_s = 0;
	if (it->deep)
		standby_enter(it, STANDBY_ALONE, it->pause_pages);
	else if ((it->device_pages_per_s || model->alone_pages_per_s) &&
		 !consumer_is_known(ctx->tgid))
		standby_enter(it, STANDBY_FIRST, 0);
	else
		standby_help(it, ctx);
}

static __always_inline bool standby_is_read(const struct pagecache_ctx *ctx)
{
	return ctx->kind == PAGECACHE_KIND_READ || ctx->kind == PAGECACHE_KIND_MISS ||
	       ctx->kind == PAGECACHE_KIND_MARKER;
}

/* The share of the device's speed, in percent, from which on a reader is left to the kernel. */
static __always_inline u32 standby_enough(const struct pagecache_ctx *ctx)
{
	return standby_is_read(ctx) ? READ_PERCENT : MAPPED_PERCENT;
}

/*
 * Whether a reader with a shallow readahead, which was near to the device's speed in its first few
 * MiB, turns out to be slower by much.
 */
static __always_inline bool standby_fell_behind(const struct standby *it,
						const struct pagecache_ctx *ctx, u64 rate)
{
	return !it->deep && !it->as_fast && it->looks >= 2 &&
	       it->stalled_percent >= WAITS_PERCENT &&
	       rate * 100 < it->device_pages_per_s * (standby_enough(ctx) - LESS_PERCENT);
}

/* Whether a reader begins at about the speed of one that was found to gain nothing. */
static __always_inline bool standby_is_like(u64 rate, u64 other)
{
	return rate * 100 >= other * LIKE_PERCENT && other * 100 >= rate * LIKE_PERCENT;
}

/*
 * A reader that has begun has read so many pages since it was looked at.  The kernel's readahead
 * has to grow first, so that the second look counts; one that is slow, or is in another file all
 * the time, is not looked at any longer.  Returns true where another look begins.
 */
static __always_inline bool standby_first(struct standby *it, const struct standby_model *model,
					  const struct pagecache_ctx *ctx, u64 pages)
{
	u64 rate = pages * 1000000000ULL / max_u64(ctx->time_ns - it->since_ns, 1);
	u32 enough = standby_enough(ctx);
	bool whole = pages >= pages_of(ctx, FIRST_BYTES);

	if (!whole && ctx->time_ns - it->began_ns < FIRST_NS)
		return false;
	if (whole && !it->looks) {
		it->looks = 1;
		return true;
	}
	whole = whole && ctx->resident_pages >= it->resident_pages + pages / 2;
	if (whole && it->device_pages_per_s && rate * 100 >= it->device_pages_per_s * enough) {
		standby_enter(it, STANDBY_ALONE, it->pause_pages);
	} else if (whole && standby_is_like(rate, model->alone_pages_per_s)) {
		standby_enter(it, STANDBY_ALONE, it->pause_pages);
		it->as_fast = 1;
	} else {
		it->first_pages_per_s = whole ? rate : 0;
		standby_help(it, ctx);
	}
	return true;
}

/* It did not get faster: the next try is so much later, of whoever reads the model. */
static __always_inline void standby_give_up(struct standby *it, struct standby_model *model,
					    const struct pagecache_ctx *ctx)
{
	it->pause_pages = min_u64(2 * it->pause_pages, pages_of(ctx, MAX_ALONE_BYTES));
	model->pause_pages = it->pause_pages;
	model->alone_pages_per_s = it->deep ? 0 : it->alone_pages_per_s;
	standby_enter(it, STANDBY_ALONE, it->pause_pages);
	it->as_fast = !it->deep;
}

/* A look at a reader that is left to the kernel has ended. */
static __always_inline void standby_alone(struct standby *it, const struct pagecache_ctx *ctx,
					  u64 pages)
{
	u64 rate = standby_rate(it);

	it->alone_pages_per_s = rate;
	it->device_pages_per_s = device_speed(ctx);
	it->stalled_percent = it->waited_ns * 100 / it->ns;
	stalled_percent = it->stalled_percent;
	device_percent = 0;
	if (it->device_pages_per_s) {
		/* It was measured in a moment, and can be too little. */
		it->device_pages_per_s = max_u64(it->device_pages_per_s, rate);
		device_percent = rate * 100 / it->device_pages_per_s;
	}
	/* With a shallow readahead there may be much to gain, should that speed be too little. */
	if (it->stalled_percent >= WAITS_PERCENT &&
	    (!it->deep || !it->device_pages_per_s ||
	     rate * 100 < it->device_pages_per_s * ENOUGH_PERCENT))
		it->left_pages -= min_u64(it->left_pages, pages);
	if (standby_fell_behind(it, ctx, rate)) {
		standby_help(it, ctx);
		return;
	}
	if (!it->left_pages)
		standby_enter(it, STANDBY_TRYING, 2 * pages_of(ctx, LOOK_BYTES));
	/* What lies long back counts less. */
	if (it->pages > pages_of(ctx, PROOF_BYTES)) {
		it->pages /= 2;
		it->ns /= 2;
		it->waited_ns /= 2;
	}
}

/*
 * Whether a look at a reader with a shallow readahead says how fast it is with help, or alone: not
 * where it has met what was cached before or read ahead, so that its file has hardly grown in the
 * cache; not where it has paused; and it is not alone while something is still on its way.
 */
static __always_inline bool standby_tells(struct standby *it, const struct pagecache_ctx *ctx,
					  u64 pages, u64 rate)
{
	if (it->deep || it->state == STANDBY_ALONE || it->state == STANDBY_TRYING)
		return true;
	if (ctx->ino != it->file || ctx->resident_pages < it->resident_pages + pages / 2)
		return false;
	if (it->state == STANDBY_CHECKING)
		return it->settled;
	it->best_pages_per_s = max_u64(it->best_pages_per_s, rate);
	return rate * SLOW_TIMES >= it->best_pages_per_s;
}

/* It is slower alone, or cannot be told to be as fast. */
static __always_inline void standby_go_on(struct standby *it, const struct pagecache_ctx *ctx)
{
	it->proof_pages = min_u64(LATER_TIMES * it->proof_pages, pages_of(ctx, MAX_ALONE_BYTES));
	standby_enter(it, STANDBY_HELPING, it->proof_pages);
}

/*
 * A reader with a shallow readahead was helped for long enough: next it is left alone for two looks
 * beyond what lies ahead of it, up to @window pages.  The first time its beginning says enough if
 * help has made it a quarter faster than it was then.
 */
static __always_inline void standby_check(struct standby *it, const struct pagecache_ctx *ctx,
					  u64 window)
{
	u64 alone = it->first_pages_per_s;

	it->first_pages_per_s = 0;
	it->device_pages_per_s = device_speed(ctx);
	if (!it->pages || (it->device_pages_per_s &&
			   it->helped_pages_per_s * 100 >= it->device_pages_per_s * NEAR_PERCENT))
		standby_enter(it, STANDBY_HELPING, it->proof_pages);
	else if (alone && it->helped_pages_per_s * 100 >= alone * GAIN_PERCENT)
		standby_go_on(it, ctx);
	else
		standby_enter(it, STANDBY_CHECKING, window + 4 * pages_of(ctx, LOOK_BYTES));
}

/* A look at a reader that is left alone for a moment has ended. */
static __always_inline void standby_checked(struct standby *it, struct standby_model *model,
					    const struct pagecache_ctx *ctx, u64 pages)
{
	it->left_pages -= min_u64(it->left_pages, pages);
	if (it->looks < 2 && it->left_pages)
		return;
	it->alone_pages_per_s = standby_rate(it);
	if (it->looks < 2 || it->alone_pages_per_s < it->helped_pages_per_s)
		standby_go_on(it, ctx);
	else
		standby_give_up(it, model, ctx);
}

/* A look at a reader that the policy reads ahead of has ended; it had this speed in it. */
static __always_inline void standby_helped(struct standby *it, struct standby_model *model,
					   const struct pagecache_ctx *ctx, u64 pages, u64 rate,
					   u64 window)
{
	u32 needed = it->state == STANDBY_TRYING ? GAIN_PERCENT : KEEP_PERCENT;

	it->left_pages -= min_u64(it->left_pages, pages);
	/* A window that is growing tells nothing yet. */
	if (!it->deep && it->state == STANDBY_HELPING && it->looks <= 2)
		it->pages = it->ns = it->waited_ns = 0;
	if (it->left_pages)
		return;
	/* In a try the last look counts: the first has the beginning in it. */
	if (it->state == STANDBY_HELPING)
		rate = standby_rate(it);
	it->helped_pages_per_s = rate;
	if (!it->deep && it->state == STANDBY_HELPING) {
		standby_check(it, ctx, window);
		return;
	}
	if (rate * 100 < it->alone_pages_per_s * needed) {
		standby_give_up(it, model, ctx);
		return;
	}
	it->pause_pages = model->pause_pages = pages_of(ctx, ALONE_BYTES);
	model->alone_pages_per_s = 0;
	standby_enter(it, STANDBY_HELPING, pages_of(ctx, PROOF_BYTES));
}

/* What the reader's threads read at once, by its last accesses. */
static __always_inline void standby_threads(struct standby *it, const struct pagecache_ctx *ctx)
{
	u32 threads;

	it->recent_threads |= 1ULL << (ctx->tid & 63);
	it->recent_pages += ctx->nr;
	if (++it->accesses % RECENT)
		return;
	threads = count_bits(it->recent_threads);
	it->threads_ahead_pages = threads > 1 ? threads * it->recent_pages / RECENT : 0;
	it->recent_pages = it->recent_threads = 0;
}

static const struct standby no_standby;

/*
 * Whether this reader is read far ahead of without a policy.  How many of its threads have read
 * last is a matter of chance, so half as far is enough to go on.
 */
static __always_inline bool standby_deep(const struct standby *it, const struct pagecache_ctx *ctx)
{
	u64 deep = pages_of(ctx, DEEP_BYTES);

	return ctx->ra_pages >= deep || it->threads_ahead_pages >= (it->deep ? deep / 2 : deep);
}

static __always_inline struct standby *standby_begin(const struct pagecache_ctx *ctx,
						     const struct standby_key *key)
{
	struct standby_model *model = standby_model_of(ctx);
	struct standby *it;

	if (!model)
		return NULL;
	/* Filled in where it lies: on the stack it would be a third of what there is. */
	bpf_map_update_elem(&standby, key, &no_standby, BPF_NOEXIST);
	it = bpf_map_lookup_elem(&standby, key);
	if (!it)
		return NULL;
	it->deep = standby_deep(it, ctx);
	standby_restart(it, model, ctx);
	standby_tell(model, it);
	return it;
}

/* The kernel's readahead has changed, or the reader's threads have. */
static __always_inline void standby_changed(struct standby *it, const struct pagecache_ctx *ctx)
{
	struct standby_model *model = standby_model_of(ctx);

	if (!model)
		return;
	it->deep = !it->deep;
	standby_restart(it, model, ctx);
	standby_look(it, ctx, 0, 0);
	standby_tell(model, it);
}

/*
 * Whether the reader is left to the kernel in this file, whatever its state: with a shallow
 * readahead, too, a file of a few MiB on a fast device is read before a request has come to it.
 */
static __always_inline bool standby_skips(struct standby *it, const struct pagecache_ctx *ctx)
{
	u64 least = it->device_pages_per_s / SHORT_FILES_PER_S;
	u32 brief = !it->deep && ctx->file_pages && ctx->file_pages < least &&
		    !consumer_is_known(ctx->tgid);
	struct standby_model *model;

	if (brief == it->in_short_file)
		return brief;
	it->in_short_file = brief;
	it->began_ns = ctx->time_ns;
	model = standby_model_of(ctx);
	if (model)
		standby_tell(model, it);
	return brief;
}

/* Whether a moment alone has lasted so long already that the reader is slower than with help. */
static __always_inline bool standby_is_slow(const struct standby *it,
					    const struct pagecache_ctx *ctx)
{
	u64 usual = pages_of(ctx, LOOK_BYTES) * 1000000000ULL / max_u64(it->helped_pages_per_s, 1);

	return it->state == STANDBY_CHECKING && ctx->time_ns - it->since_ns > SLOW_TIMES * usual;
}

/*
 * Whether the reader of this access is left to the kernel.  It has come to @place, pages from where
 * a file (@ino) or an order (0) begins; up to @window pages ahead of it may have been read.
 */
PAGECACHE_STEP bool stands_down(struct pagecache_ctx *ctx, u64 ino, u64 place, u64 window)
{
	struct standby_model *model;
	struct standby_key key = {};
	struct standby *it;
	u64 pages, wall, ran, rate;

	if (!ctx)
		return false;
	key.model = ctx->model;
	key.tgid = ctx->tgid;
	it = bpf_map_lookup_elem(&standby, &key) ?: standby_begin(ctx, &key);
	if (!it)
		return false;
	if (standby_is_read(ctx))
		standby_threads(it, ctx);
	if (standby_deep(it, ctx) != it->deep)
		standby_changed(it, ctx);
	if (standby_skips(it, ctx))
		return true;
	if (it->tid != ctx->tid || it->ino != ino) {
		/* Of several threads one is looked at. */
		if (it->tid == ctx->tid || ctx->time_ns > it->seen_ns + 100000000) {
			standby_look(it, ctx, ino, place);
			it->seen_ns = ctx->time_ns;
		}
		model = it->state == STANDBY_FIRST ? standby_model_of(ctx) : NULL;
		if (model)
			standby_first(it, model, ctx, 0);
		return standby_leaves(it);
	}
	it->seen_ns = ctx->time_ns;
	pages = place > it->place ? place - it->place : it->place - place;
	if (it->state == STANDBY_FIRST) {
		model = standby_model_of(ctx);
		if (model && standby_first(it, model, ctx, pages)) {
			standby_look(it, ctx, ino, place);
			standby_tell(model, it);
		}
		return standby_leaves(it);
	}
	if (pages < pages_of(ctx, LOOK_BYTES)) {
		if (standby_is_slow(it, ctx)) {
			standby_go_on(it, ctx);
			standby_look(it, ctx, ino, place);
		}
		return standby_leaves(it);
	}
	model = standby_model_of(ctx);
	if (!model)
		return false;
	wall = max_u64(ctx->time_ns - it->since_ns, 1);
	ran = min_u64(pagecache_reader_busy_ns() - it->busy_ns, wall);
	rate = pages * 1000000000ULL / wall;
	if (standby_tells(it, ctx, pages, rate)) {
		it->looks++;
		it->pages += pages;
		it->ns += wall;
		it->waited_ns += wall - ran;
	}
	if (it->state == STANDBY_ALONE)
		standby_alone(it, ctx, pages);
	else if (it->state == STANDBY_CHECKING)
		standby_checked(it, model, ctx, pages);
	else
		standby_helped(it, model, ctx, pages, rate, window);
	standby_look(it, ctx, ino, place);
	standby_tell(model, it);
	return standby_leaves(it);
}

#else

static __always_inline bool stands_down(struct pagecache_ctx *ctx, u64 ino, u64 place, u64 window)
{
	return false;
}

#endif /* PAGECACHE_ENGINE_AGENT */

#endif /* STANDBY_BPF_H */
