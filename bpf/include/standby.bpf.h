/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * standby.bpf.h - whether reading ahead is worth it where the kernel's own readahead is deep.
 *
 * With a read_ahead_kb of some MiB the kernel by itself keeps many devices busy; what a policy adds
 * then is work for the CPUs that the reader needs.  So there a model is first left to the kernel,
 * and how fast it is read is measured.  If its reader waits much of its time the policy tries for a
 * while, and goes on only where that is faster; it tries again later, and later again.
 *
 * Only engine agent measures: what a task has run is not told to the module's policies, and there
 * the kernel's readahead is replaced.
 */
#ifndef STANDBY_BPF_H
#define STANDBY_BPF_H

#include "policy.bpf.h"

#ifdef PAGECACHE_ENGINE_AGENT

#define DEEP_BYTES (4 << 20) /* a readahead of so much is deep */
#define LOOK_BYTES (32 << 20) /* read between two looks */
#define ALONE_BYTES (256ULL << 20) /* left to the kernel before the first try, doubled later */
#define MAX_ALONE_BYTES (16ULL << 30)
#define HELP_BYTES (8ULL << 30) /* read with the policy's help before it has to show again */
#define WAITS_PERCENT 10 /* of its time; a reader that waits less gains nothing */

enum standby_state { STANDBY_ALONE, STANDBY_TRYING, STANDBY_HELPING };

struct standby_key {
	u32 model;
};

struct standby {
	u64 alone_pages_per_s; /* how fast the model was read with the kernel's readahead alone, */
	u64 helped_pages_per_s; /* and with the policy's */
	u32 standing_down; /* 1: the model is left to the kernel */
	u32 stalled_percent; /* of its time the reader waited while it was, if looks is not 0 */
	u32 state; /* enum standby_state */
	u32 tid; /* the reader that is looked at, */
	u64 ino; /* in this file */
	u64 place; /* the look began here, */
	u64 since_ns; /* then, */
	u64 busy_ns; /* when its task had run so long */
	u64 seen_ns; /* it was here last */
	u64 left_pages; /* until the state may change */
	u64 pause_pages; /* the next time that it is left to the kernel it is for so long */
	u64 looks; /* in this state */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct standby_key);
	__type(value, struct standby);
} standby PAGECACHE_REPORT("models that are left to the kernel's readahead, and why") SEC(".maps");

PAGECACHE_GAUGE(standing_down, "models", "models left to the kernel's readahead, which keeps up");
PAGECACHE_GAUGE(stalls_measured, "models",
		"those of them whose reader was measured while it waited");
PAGECACHE_GAUGE(stalled_percent, "percent", "of its time the reader measured last waited");

static __always_inline void standby_set(struct standby *it, u32 state, u64 pages)
{
	u32 down = state == STANDBY_ALONE;

	if (down != it->standing_down)
		__sync_fetch_and_add(&standing_down, down ? 1 : -1);
	if (it->standing_down && it->looks)
		__sync_fetch_and_add(&stalls_measured, -1);
	it->standing_down = down;
	it->state = state;
	it->left_pages = pages;
	it->looks = 0;
}

static __always_inline void standby_look(struct standby *it, const struct pagecache_ctx *ctx,
					 u64 ino, u64 place, u64 busy)
{
	it->tid = ctx->tid;
	it->ino = ino;
	it->place = place;
	it->since_ns = ctx->time_ns;
	it->busy_ns = busy;
}

/* So many pages were read in this look, so fast. */
static __always_inline void standby_judge(struct standby *it, const struct pagecache_ctx *ctx,
					  u64 pages, u64 rate)
{
	u64 longest = pages_of(ctx, MAX_ALONE_BYTES);
	bool waits = it->state != STANDBY_ALONE || it->stalled_percent >= WAITS_PERCENT;

	it->looks++;
	if (it->state == STANDBY_ALONE)
		it->alone_pages_per_s = rate;
	else if (it->looks > 1) /* the first has the beginning in it */
		it->helped_pages_per_s = rate;
	if (waits)
		it->left_pages -= min_u64(it->left_pages, pages);
	if (it->left_pages)
		return;
	if (it->state == STANDBY_ALONE) {
		standby_set(it, STANDBY_TRYING, 2 * pages_of(ctx, LOOK_BYTES));
	} else if (it->state == STANDBY_TRYING &&
		   it->helped_pages_per_s * 10 > it->alone_pages_per_s * 11) {
		standby_set(it, STANDBY_HELPING, pages_of(ctx, HELP_BYTES));
	} else {
		it->pause_pages = min_u64(2 * it->pause_pages, longest);
		standby_set(it, STANDBY_ALONE, it->pause_pages);
	}
}

/*
 * Whether the model of this access is left to the kernel.  The reader has come to @place, pages
 * from where a file (@ino) or an order (0) begins.
 */
PAGECACHE_STEP bool stands_down(struct pagecache_ctx *ctx, u64 ino, u64 place)
{
	struct standby_key key = {};
	struct standby fresh = {}, *it;
	u64 busy = pagecache_reader_busy_ns(), wall, ran;

	if (!ctx)
		return false;
	key.model = ctx->model;
	if (ctx->ra_pages < pages_of(ctx, DEEP_BYTES))
		return false;
	it = bpf_map_lookup_elem(&standby, &key);
	if (!it) {
		fresh.pause_pages = pages_of(ctx, ALONE_BYTES);
		bpf_map_update_elem(&standby, &key, &fresh, BPF_NOEXIST);
		it = bpf_map_lookup_elem(&standby, &key);
		if (!it)
			return false;
		standby_set(it, STANDBY_ALONE, it->pause_pages);
	}
	if (it->tid != ctx->tid || it->ino != ino || place < it->place) {
		/* Of several readers one is looked at. */
		if (it->tid == ctx->tid || ctx->time_ns > it->seen_ns + 100000000) {
			standby_look(it, ctx, ino, place, busy);
			it->seen_ns = ctx->time_ns;
		}
		return it->standing_down;
	}
	it->seen_ns = ctx->time_ns;
	if (place - it->place < pages_of(ctx, LOOK_BYTES))
		return it->standing_down;
	wall = max_u64(ctx->time_ns - it->since_ns, 1);
	ran = busy - it->busy_ns;
	if (it->state == STANDBY_ALONE) {
		it->stalled_percent = ran < wall ? (wall - ran) * 100 / wall : 0;
		stalled_percent = it->stalled_percent;
		if (!it->looks)
			__sync_fetch_and_add(&stalls_measured, 1);
	}
	standby_judge(it, ctx, place - it->place, (place - it->place) * 1000000000ULL / wall);
	standby_look(it, ctx, ino, place, busy);
	return it->standing_down;
}

#else

static __always_inline bool stands_down(struct pagecache_ctx *ctx, u64 ino, u64 place)
{
	return false;
}

#endif /* PAGECACHE_ENGINE_AGENT */

#endif /* STANDBY_BPF_H */
