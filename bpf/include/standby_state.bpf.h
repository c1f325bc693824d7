/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * standby_state.bpf.h - what is known of readers, and of models, that may be left to the kernel.
 *
 * standby.bpf.h decides; status and the exporter tell of it by the gauges here.
 */
#ifndef STANDBY_STATE_BPF_H
#define STANDBY_STATE_BPF_H

#include "policy.bpf.h"

#define ALONE_BYTES (1ULL << 30) /* left to the kernel before the first try, doubled later */

enum standby_state {
	STANDBY_ALONE,
	STANDBY_TRYING,
	STANDBY_HELPING,
	STANDBY_CHECKING, /* left to the kernel for a moment */
	STANDBY_FIRST, /* left to the kernel, as it has just begun */
};

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
	u64 proof_pages; /* where readahead is shallow: helped for so long until it is left alone */
	u64 best_pages_per_s; /* of a look in this state */
	u64 file; /* the look began in this file, */
	u64 resident_pages; /* which had so much in the cache then */
	u32 deep; /* 1: the kernel's readahead is, or that of its threads together */
	u32 settled; /* 1: nothing was on its way for any reader when the look began */
	u64 began_ns; /* its first access */
	u64 first_pages_per_s; /* alone, in its beginning, until that was compared; 0: not known */
	u32 as_fast; /* 1: it is left to the kernel since it is as fast there as with help */
	u32 in_short_file; /* 1: it is in a file that is over before help has come */
};

/* What is known of a model, of which status tells. */
struct standby_model {
	u64 pause_pages; /* a reader is left to the kernel for so long before the first try */
	u64 ra_pages; /* the kernel's readahead when this was found */
	u32 standing_down; /* as the reader that was looked at last */
	u32 measured;
	u64 alone_pages_per_s; /* a reader was as fast without help, with a shallow readahead; 0:
				  none */
	u32 as_fast; /* 1: that is why it is left to the kernel now */
	u32 in_short_file; /* 1: or this is */
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
PAGECACHE_GAUGE(as_fast_alone, "models", "those of them that a policy was seen not to make faster");
PAGECACHE_GAUGE(short_files, "models",
		"those of them whose reader is in a file that its device reads in an instant");
PAGECACHE_GAUGE(stalls_measured, "models",
		"those of them whose reader was measured while it waited");
PAGECACHE_GAUGE(stalled_percent, "percent", "of its time the reader measured last waited");
PAGECACHE_GAUGE(device_percent, "percent",
		"of its device's speed that reader had; 0: what the device can do is not known");

/* What status tells of a model is what its reader of this moment does. */
static __always_inline void standby_tell(struct standby_model *model, const struct standby *it)
{
	u32 brief = it->in_short_file, down = brief || it->standing_down;
	u32 measured = !brief && down && it->looks, as_fast = !brief && down && it->as_fast;

	if (down != model->standing_down)
		__sync_fetch_and_add(&standing_down, down ? 1 : -1);
	if (measured != model->measured)
		__sync_fetch_and_add(&stalls_measured, measured ? 1 : -1);
	if (as_fast != model->as_fast)
		__sync_fetch_and_add(&as_fast_alone, as_fast ? 1 : -1);
	if (brief != model->in_short_file)
		__sync_fetch_and_add(&short_files, brief ? 1 : -1);
	model->standing_down = down;
	model->measured = measured;
	model->as_fast = as_fast;
	model->in_short_file = brief;
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
		model->alone_pages_per_s = 0;
	}
	return model;
}

#endif /* STANDBY_STATE_BPF_H */
