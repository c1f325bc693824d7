// SPDX-License-Identifier: GPL-2.0-only
/*
 * multiplex - several models under one memory budget: the one wanted last goes first
 *
 * When to use: a node that switches between more models than fit its memory (AlpaServe,
 *	ServerlessLLM style).  The serving layer writes into the map `plans` when it expects to
 *	need a model and how fast that can be read; without that, each model's own rhythm is
 *	learned.  The map `scores` tells a scheduler how much of each model is here.
 * Limits: up to 64 models at a time.  A model's files count as one: within it, the oldest pages
 *	go first.  Models are taken to be read from front to back: what a reader has passed counts
 *	by the model's next use, what it has not reached is wanted now.
 *	Engine agent drops from the files of the worst model when memory is short.
 *
 * How: what a page is worth is the time that reading it again takes, over the time until it is
 * wanted.  Reclaim gets the pages of the model whose are worth least; the others are kept.  A
 * model's size does not come into it: a large one takes longer to read, and its pages are more, by
 * the same factor; and of the worst one only as much goes as is needed.
 */
#include "pieces.bpf.h"

PAGECACHE_KNOB(u32, budget_mib, 0, "MiB", 0, 1073741824,
	       "memory for all models together; 0: all that the engine lets a policy keep");
PAGECACHE_KNOB(u32, idle_ms, 500, "ms", 1, 3600000, "a model unread for so long is not in use");
PAGECACHE_KNOB(u32, device_mb_per_s, 1000, "MB/s", 1, 1000000,
	       "speed of reading a model whose plan names none");

#define MODELS 64
#define PROBES 4 /* slots in which a model can be */
#define STEP_BYTES (1 << 20)
#define UNKNOWN (1ULL << 42) /* ns: more than an hour */

struct model_key {
	u32 model;
};

struct plan {
	u64 due_ns; /* CLOCK_MONOTONIC; 0: unknown */
	u64 mb_per_s; /* 0: device_mb_per_s */
};

struct score {
	u64 resident_pages;
	u64 last_use_ns;
	u64 every_ns; /* from one use to the next, smoothed; 0: unknown */
	u64 uses;
	u64 cost_to_keep; /* the higher, the sooner it is evicted */
	u32 model;
	u32 reserved;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct model_key);
	__type(value, struct plan);
} plans PAGECACHE_HINT("when a model is wanted next, and how fast it can be read") SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MODELS);
	__type(key, u32);
	__type(value, struct score);
} scores PAGECACHE_REPORT("how much of each model is resident, and what it is worth") SEC(".maps");

/* How far a file has been read in the present use of its model, and up to where it is gone. */
struct cursor {
	u64 use;
	u64 next;
	u64 gone;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct piece_key);
	__type(value, struct cursor);
} progress SEC(".maps");

static u64 worst_cost, judged_ns;

static __always_inline struct score *score_at(u32 slot)
{
	return bpf_map_lookup_elem(&scores, &slot);
}

static __always_inline struct score *score_of(const struct pagecache_ctx *ctx)
{
	struct score *found = NULL;

	/* Numbers of models only grow: one of long ago leaves its slot to another. */
	for (int i = 0; i < PROBES; i++) {
		struct score *s = score_at((ctx->model + i * 17) % MODELS);

		if (s && s->model == ctx->model)
			return s;
		if (s && !found && (!s->model || (s64)s->resident_pages <= 0))
			found = s;
	}
	if (found) {
		__builtin_memset(found, 0, sizeof(*found));
		found->model = ctx->model;
	}
	return found;
}

static __always_inline struct cursor *cursor_of(const struct pagecache_ctx *ctx)
{
	struct piece_key key = file_key_of(ctx);

	return bpf_map_lookup_elem(&progress, &key);
}

static __always_inline bool in_use(const struct score *s, u64 now)
{
	return now - s->last_use_ns < (u64)idle_ms * 1000000;
}

/*
 * Whether a plan's time has passed: the model was used since, or nobody came within the time that
 * is usual between two uses.  A plan that is not taken back would hold its model for ever.
 */
static __always_inline bool is_over(const struct plan *plan, const struct score *s, u64 now)
{
	u64 grace = max_u64(s->every_ns, (u64)idle_ms * 1000000);

	return s->last_use_ns > plan->due_ns || now > plan->due_ns + grace;
}

/* Time until a model (of one in use: what was read already) is wanted, times its speed. */
static __always_inline u64 cost_of(const struct score *s, u64 now)
{
	struct model_key key = { s->model };
	struct plan *plan = bpf_map_lookup_elem(&plans, &key);
	u64 wait, speed = device_mb_per_s;

	if (plan && plan->mb_per_s)
		speed = plan->mb_per_s;
	if (plan && plan->due_ns > now)
		wait = plan->due_ns - now;
	else if ((plan && plan->due_ns && !is_over(plan, s, now)) || in_use(s, now))
		wait = 0;
	else
		wait = max_u64(s->every_ns ?: UNKNOWN, now - s->last_use_ns);
	return (min_u64(wait, UNKNOWN * 2) >> 10) * min_u64(speed, 1 << 20);
}

struct judgement {
	u64 now;
	u64 worst;
};

LOOP_STEP(judge_one, MODELS, u32 slot, struct judgement *it)
{
	struct score *s = score_at(slot);

	if (s && s->model && (s64)s->resident_pages > 0) {
		s->cost_to_keep = cost_of(s, it->now);
		it->worst = max_u64(it->worst, s->cost_to_keep);
	}
	return 0;
}

static __always_inline void judge(u64 now)
{
	struct judgement it = { .now = now };

	LOOP(judge_one, &it);
	worst_cost = it.worst;
	judged_ns = now;
}

/* Whether a reader is on its way to this page. */
static __always_inline bool not_reached(const struct pagecache_ctx *ctx, const struct score *s)
{
	struct cursor *cursor = cursor_of(ctx);

	return in_use(s, ctx->time_ns) &&
	       (!cursor || cursor->use != s->uses || ctx->index >= cursor->next);
}

/* Whether the pages of this model go first. */
static __always_inline bool is_worst(const struct pagecache_ctx *ctx)
{
	struct score *s = score_of(ctx);

	if (!s || not_reached(ctx, s))
		return false;
	if (ctx->time_ns > judged_ns + 5000000)
		judge(ctx->time_ns);
	return cost_of(s, judged_ns) >= worst_cost;
}

PAGECACHE_INIT(multiplex_init)
(struct pagecache_ctx *ctx)
{
	keep_at_most(ctx, budget_mib);
	return 0;
}

PAGECACHE_ACCESS(multiplex_access)
(struct pagecache_ctx *ctx)
{
	struct piece_key key = file_key_of(ctx);
	struct score *s = score_of(ctx);
	u64 since = s ? ctx->time_ns - s->last_use_ns : 0;
	struct cursor *cursor = cursor_of(ctx), fresh = {};

	if (!s)
		return;
	if (!s->last_use_ns || since > (u64)idle_ms * 1000000) {
		if (s->last_use_ns)
			s->every_ns = s->every_ns ? (3 * s->every_ns + since) / 4 : since;
		s->uses++;
		judged_ns = 0;
	}
	s->last_use_ns = ctx->time_ns;
	if (cursor) {
		cursor->use = s->uses;
		cursor->next = ctx->index;
		return;
	}
	fresh.use = s->uses;
	fresh.next = ctx->index;
	bpf_map_update_elem(&progress, &key, &fresh, BPF_NOEXIST);
}

PAGECACHE_ADDED(multiplex_added)
(struct pagecache_ctx *ctx)
{
	struct score *s = score_of(ctx);
	struct cursor *cursor = cursor_of(ctx);

	if (s)
		__sync_fetch_and_add(&s->resident_pages, ctx->nr);
	if (cursor && ctx->index < cursor->gone)
		cursor->gone = ctx->index;
}

PAGECACHE_REMOVED(multiplex_removed)
(struct pagecache_ctx *ctx)
{
	struct score *s = score_of(ctx);
	struct cursor *cursor = cursor_of(ctx);

	if (s)
		__sync_fetch_and_add(&s->resident_pages, -ctx->nr);
	if (cursor && ctx->index <= cursor->gone)
		cursor->gone = max_u64(cursor->gone, ctx->index + ctx->nr);
}

PAGECACHE_EVICT(multiplex_evict)
(struct pagecache_ctx *ctx)
{
	return is_worst(ctx) ? PAGECACHE_EVICT_NOW : PAGECACHE_EVICT_KEEP;
}

/*
 * As much as is wanted, where reclaim takes it, too: from what is left of the file's front.  What
 * is dropped beyond that would have to be read again.
 */
PAGECACHE_PRESSURE(multiplex_pressure)
(struct pagecache_ctx *ctx, struct pagecache_pressure *want)
{
	struct score *s = score_of(ctx);
	struct cursor *cursor = cursor_of(ctx);
	u64 end = ctx->file_pages, pages;

	if (!s || !cursor || !is_worst(ctx))
		return;
	if (in_use(s, ctx->time_ns))
		end = min_u64(end, cursor->next);
	if (cursor->gone >= ctx->file_pages)
		cursor->gone = 0; /* some were passed over */
	if (cursor->gone >= end)
		return;
	pages = min_u64(max_u64(want->pages, pages_of(ctx, STEP_BYTES)), end - cursor->gone);
	pagecache_drop(ctx, cursor->gone, pages);
	cursor->gone += pages;
}

PAGECACHE_POLICY(multiplex, .init = (void *)multiplex_init, .access = (void *)multiplex_access,
		 .added = (void *)multiplex_added, .removed = (void *)multiplex_removed,
		 .evict = (void *)multiplex_evict, .pressure = (void *)multiplex_pressure,
		 .access_step_bytes = STEP_BYTES);
