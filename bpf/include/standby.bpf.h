/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * standby.bpf.h - whether reading ahead is worth it where the kernel's own readahead is deep.
 *
 * With a read_ahead_kb of some MiB the kernel by itself keeps many devices busy, and so does a
 * reader of several threads whose reads are large.  What a policy adds then is work for the CPUs
 * that the reader needs.  So there each reader is first left to the kernel, and how fast it reads
 * and how much of its time it waits is measured.  That is how it stays as long as it comes near to
 * what the device can do, or hardly waits.  If it does not, the policy tries for a while, and goes
 * on only as long as that is faster; it tries again later, and later again.
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
#define ALONE_BYTES (1ULL << 30) /* left to the kernel before the first try, doubled later */
#define MAX_ALONE_BYTES (16ULL << 30)
#define PROOF_BYTES (256ULL << 20) /* with the policy's help, until it has to show again */
#define WAITS_PERCENT 10 /* of its time; a reader that waits less gains nothing */
#define ENOUGH_PERCENT 70 /* of the device's speed: little is left to gain */
#define GAIN_PERCENT 125 /* of the speed without it, in a short try */
#define KEEP_PERCENT 110 /* and later on */
#define RECENT 8 /* accesses whose threads are told apart */

enum standby_state { STANDBY_ALONE, STANDBY_TRYING, STANDBY_HELPING };

struct standby_key {
	u32 model;
	u32 tgid;
};

struct standby {
	u64 alone_pages_per_s; /* how fast it read with the kernel's readahead alone, */
	u64 helped_pages_per_s; /* and with the policy's */
	u64 device_pages_per_s; /* what its device can do; 0: not known */
	u64 threads_ahead_pages; /* what its threads together read at once */
	u32 standing_down; /* 1: the reader is left to the kernel */
	u32 stalled_percent; /* of its time it waited while it was, if looks is not 0 */
	u32 state; /* enum standby_state */
	u32 tid; /* the thread that is looked at, */
	u64 ino; /* in this file */
	u64 place; /* the look began here, */
	u64 since_ns; /* then, */
	u64 busy_ns; /* when its task had run so long */
	u64 seen_ns; /* it was here last */
	u64 left_pages; /* until the state may change */
	u64 pause_pages; /* the next time that it is left to the kernel it is for so long */
	u64 looks; /* in this state */
	u64 pages; /* read in them, */
	u64 ns; /* in so long, */
	u64 waited_ns; /* and waited for so long */
	u64 recent_pages; /* of the last accesses, */
	u64 recent_threads; /* by these threads: a bit for each number modulo 64 */
	u64 accesses;
};

/* What is known of a model, of which status tells. */
struct standby_model {
	u64 pause_pages; /* a reader is left to the kernel for so long before the first try */
	u64 ra_pages; /* the kernel's readahead when this was found */
	u32 standing_down; /* as the reader that was looked at last */
	u32 measured;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct standby_key);
	__type(value, struct standby);
} standby PAGECACHE_REPORT("readers that are left to the kernel's readahead, and why") SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, u32);
	__type(value, struct standby_model);
} standby_models SEC(".maps");

PAGECACHE_GAUGE(standing_down, "models", "models left to the kernel's readahead, which keeps up");
PAGECACHE_GAUGE(stalls_measured, "models",
		"those of them whose reader was measured while it waited");
PAGECACHE_GAUGE(stalled_percent, "percent", "of its time the reader measured last waited");
PAGECACHE_GAUGE(device_percent, "percent",
		"of its device's speed that reader had; 0: what the device can do is not known");

/* What status tells of a model is what its reader of this moment does. */
static __always_inline void standby_tell(struct standby_model *model, const struct standby *it)
{
	u32 down = it->standing_down, measured = down && it->looks;

	if (down != model->standing_down)
		__sync_fetch_and_add(&standing_down, down ? 1 : -1);
	if (measured != model->measured)
		__sync_fetch_and_add(&stalls_measured, measured ? 1 : -1);
	model->standing_down = down;
	model->measured = measured;
}

static __always_inline struct standby_model *standby_model_of(const struct pagecache_ctx *ctx)
{
	struct standby_model fresh = {}, *model;
	u32 key = ctx->model;

	model = bpf_map_lookup_elem(&standby_models, &key);
	if (!model) {
		bpf_map_update_elem(&standby_models, &key, &fresh, BPF_NOEXIST);
		model = bpf_map_lookup_elem(&standby_models, &key);
	}
	if (model && model->ra_pages != ctx->ra_pages) {
		model->ra_pages = ctx->ra_pages;
		model->pause_pages = pages_of(ctx, ALONE_BYTES);
	}
	return model;
}

static __always_inline void standby_enter(struct standby *it, u32 state, u64 pages)
{
	it->standing_down = state == STANDBY_ALONE;
	it->state = state;
	it->left_pages = pages;
	it->looks = it->pages = it->ns = it->waited_ns = 0;
}

static __always_inline void standby_look(struct standby *it, const struct pagecache_ctx *ctx,
					 u64 ino, u64 place)
{
	it->tid = ctx->tid;
	it->ino = ino;
	it->place = place;
	it->since_ns = ctx->time_ns;
	it->busy_ns = pagecache_reader_busy_ns();
}

/* The speed of the device of this file, in pages a second; 0: not known. */
static __always_inline u64 device_speed(const struct pagecache_ctx *ctx)
{
	struct pagecache_file_key key = pagecache_key_of(ctx);
	struct pagecache_agent_tag *tag = bpf_map_lookup_elem(&tags, &key);

	return tag ? pages_of(ctx, (u64)tag->device_mib_s << 20) : 0;
}

/* It did not get faster: the next try is so much later, of whoever reads the model. */
static __always_inline void standby_give_up(struct standby *it, struct standby_model *model,
					    const struct pagecache_ctx *ctx)
{
	it->pause_pages = min_u64(2 * it->pause_pages, pages_of(ctx, MAX_ALONE_BYTES));
	model->pause_pages = it->pause_pages;
	standby_enter(it, STANDBY_ALONE, it->pause_pages);
}

/* A look at a reader that is left to the kernel has ended. */
static __always_inline void standby_alone(struct standby *it, const struct pagecache_ctx *ctx,
					  u64 pages)
{
	u64 rate = it->pages * 1000000000ULL / it->ns;

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
	if (it->stalled_percent >= WAITS_PERCENT &&
	    (!it->device_pages_per_s || rate * 100 < it->device_pages_per_s * ENOUGH_PERCENT))
		it->left_pages -= min_u64(it->left_pages, pages);
	if (!it->left_pages)
		standby_enter(it, STANDBY_TRYING, 2 * pages_of(ctx, LOOK_BYTES));
	/* What lies long back counts less. */
	if (it->pages > pages_of(ctx, PROOF_BYTES)) {
		it->pages /= 2;
		it->ns /= 2;
		it->waited_ns /= 2;
	}
}

/* A look at a reader that the policy reads ahead of has ended; it had this speed in it. */
static __always_inline void standby_helped(struct standby *it, struct standby_model *model,
					   const struct pagecache_ctx *ctx, u64 pages, u64 rate)
{
	u32 needed = it->state == STANDBY_TRYING ? GAIN_PERCENT : KEEP_PERCENT;

	it->left_pages -= min_u64(it->left_pages, pages);
	if (it->left_pages)
		return;
	/* In a try the last look counts: the first has the beginning in it. */
	if (it->state == STANDBY_HELPING)
		rate = it->pages * 1000000000ULL / it->ns;
	it->helped_pages_per_s = rate;
	if (rate * 100 < it->alone_pages_per_s * needed) {
		standby_give_up(it, model, ctx);
		return;
	}
	it->pause_pages = model->pause_pages = pages_of(ctx, ALONE_BYTES);
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
	it->pause_pages = model->pause_pages;
	standby_enter(it, STANDBY_ALONE, it->pause_pages);
	it->standing_down = 0; /* until it is known whether the readahead is deep */
	standby_tell(model, it);
	return it;
}

/*
 * Whether this reader is read far ahead of without a policy.  How many of its threads have read
 * last is a matter of chance, so half as far is enough to go on.
 */
static __always_inline bool standby_deep(struct standby *it, const struct pagecache_ctx *ctx)
{
	bool was = it->standing_down || it->state != STANDBY_ALONE;
	u64 deep = pages_of(ctx, DEEP_BYTES);
	bool now = ctx->ra_pages >= deep || it->threads_ahead_pages >= (was ? deep / 2 : deep);
	struct standby_model *model;

	if (now == was)
		return now;
	model = standby_model_of(ctx);
	if (!model)
		return false;
	it->pause_pages = model->pause_pages;
	standby_enter(it, STANDBY_ALONE, it->pause_pages);
	it->standing_down = now;
	standby_look(it, ctx, 0, 0);
	standby_tell(model, it);
	return now;
}

/*
 * Whether the reader of this access is left to the kernel.  It has come to @place, pages from where
 * a file (@ino) or an order (0) begins.
 */
PAGECACHE_STEP bool stands_down(struct pagecache_ctx *ctx, u64 ino, u64 place)
{
	struct standby_model *model;
	struct standby_key key = {};
	struct standby *it;
	u64 pages, wall, ran;

	if (!ctx)
		return false;
	key.model = ctx->model;
	key.tgid = ctx->tgid;
	it = bpf_map_lookup_elem(&standby, &key) ?: standby_begin(ctx, &key);
	if (!it)
		return false;
	if (ctx->kind == PAGECACHE_KIND_READ || ctx->kind == PAGECACHE_KIND_MISS ||
	    ctx->kind == PAGECACHE_KIND_MARKER)
		standby_threads(it, ctx);
	if (!standby_deep(it, ctx))
		return false;
	if (it->tid != ctx->tid || it->ino != ino) {
		/* Of several threads one is looked at. */
		if (it->tid == ctx->tid || ctx->time_ns > it->seen_ns + 100000000) {
			standby_look(it, ctx, ino, place);
			it->seen_ns = ctx->time_ns;
		}
		return it->standing_down;
	}
	it->seen_ns = ctx->time_ns;
	pages = place > it->place ? place - it->place : it->place - place;
	if (pages < pages_of(ctx, LOOK_BYTES))
		return it->standing_down;
	model = standby_model_of(ctx);
	if (!model)
		return false;
	wall = max_u64(ctx->time_ns - it->since_ns, 1);
	ran = min_u64(pagecache_reader_busy_ns() - it->busy_ns, wall);
	it->looks++;
	it->pages += pages;
	it->ns += wall;
	it->waited_ns += wall - ran;
	if (it->state == STANDBY_ALONE)
		standby_alone(it, ctx, pages);
	else
		standby_helped(it, model, ctx, pages, pages * 1000000000ULL / wall);
	standby_look(it, ctx, ino, place);
	standby_tell(model, it);
	return it->standing_down;
}

#else

static __always_inline bool stands_down(struct pagecache_ctx *ctx, u64 ino, u64 place)
{
	return false;
}

#endif /* PAGECACHE_ENGINE_AGENT */

#endif /* STANDBY_BPF_H */
