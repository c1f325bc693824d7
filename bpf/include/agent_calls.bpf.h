/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * agent_calls.bpf.h - what a policy on engine agent can ask for, and the maps it goes through.
 */
#ifndef AGENT_CALLS_BPF_H
#define AGENT_CALLS_BPF_H

#include "inodes.bpf.h"

/* Beside what it answers, the kernel reads for the reader by itself. */
#define PAGECACHE_KERNEL_READS 1

/* The hook readahead is asked about each access, and about each try of a fault. */
#define PAGECACHE_TELLS_HITS 1

#define PAGECACHE_AGENT_MAX_EXTENT_BYTES (1 << 30) /* of one request */
#define PAGECACHE_AGENT_MAX_EXTENT (PAGECACHE_AGENT_MAX_EXTENT_BYTES >> 12) /* in pages */
/* Of a reader whose cgroup has not been looked at yet; its first request makes the agent look. */
#define PAGECACHE_AGENT_UNKNOWN_BYTES (16 << 20)

/* Set by the agent before it loads this. */
const volatile u32 agent_page_shift = 12;
const volatile u64 agent_pidns_dev; /* its PID namespace, for the map `own` */
const volatile u64 agent_pidns_ino;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 131072);
	__uint(map_flags, 1); /* BPF_F_NO_PREALLOC */
	__type(key, struct pagecache_file_key);
	__type(value, struct pagecache_agent_tag);
} tags SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, INODE_WORDS);
	__type(key, u32);
	__type(value, u64);
} inode_bits SEC(".maps");

/* The agent and its workers, whose accesses are none; by the numbers of its PID namespace. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, u32);
	__type(value, u32);
} own SEC(".maps");

/* How many pages may be read ahead of a process: what its memory cgroup and the host allow. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, u32); /* tgid */
	__type(value, u64);
} windows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} requests SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct pagecache_agent_state);
} state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct pagecache_agent_orders);
} orders SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, PAGECACHE_COUNTER_NR);
	__type(key, u32);
	__type(value, u64);
} counters SEC(".maps");

struct agent_cursor_key {
	struct pagecache_file_key file;
	u64 consumer;
};

/* What has been asked for on behalf of one process in one file. */
struct agent_cursor {
	u64 from;
	u64 to;
	u64 mark; /* the next marked page */
	u64 step; /* from one mark to the next; 0: no marks */
	u64 touched; /* pages accessed so far, a second time where the reader came back */
	u64 last_start; /* the last access */
	u64 last_end;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct agent_cursor_key);
	__type(value, struct agent_cursor);
} cursors SEC(".maps");

static const struct agent_cursor agent_no_cursor;

/*
 * Made if need be; NULL: there is no memory.  The key is copied to the stack, here and below: until
 * 6.2 the verifier takes none for a map that lies in what a global function was given.
 */
static __always_inline struct agent_cursor *agent_cursor_of(const struct agent_cursor_key *of)
{
	struct agent_cursor_key key = *of;
	struct agent_cursor *cursor = bpf_map_lookup_elem(&cursors, &key);

	if (cursor)
		return cursor;
	bpf_map_update_elem(&cursors, &key, &agent_no_cursor, BPF_NOEXIST);
	return bpf_map_lookup_elem(&cursors, &key);
}

/* One call of a hook; a policy sees ctx only.  No pointers: a global function may be given it. */
struct agent_call {
	struct pagecache_ctx ctx;
	struct agent_cursor_key key;
	u32 hook; /* enum pagecache_hook */
	u32 random; /* 1: the reader has said that it reads this mapping at random */
	u32 forget; /* 1: the policy wants to be told of this reader's accesses one by one again */
	u32 reserved;
	u64 touched; /* of the reader's cursor */
};

static __always_inline struct agent_call *agent_call_of(struct pagecache_ctx *ctx)
{
	return (struct agent_call *)ctx;
}

static __always_inline void agent_count(u32 counter, u64 n)
{
	u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		*value += n;
}

static __always_inline struct pagecache_agent_state *agent_state(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&state, &zero);
}

static __always_inline struct pagecache_agent_orders *agent_orders(void)
{
	u32 zero = 0;

	return bpf_map_lookup_elem(&orders, &zero);
}

static __always_inline s64 agent_request(struct pagecache_ctx *ctx,
					 const struct pagecache_file_key *file, u32 kind, u64 start,
					 u64 nr, s32 node, s64 code, const char *message)
{
	struct pagecache_request *r = bpf_ringbuf_reserve(&requests, sizeof(*r), 0);
	struct pagecache_agent_state *all;

	if (!r) {
		all = agent_state();
		if (all)
			__sync_fetch_and_add(&all->lost, 1);
		agent_count(PAGECACHE_COUNTER_refused_calls, 1);
		return -28; /* ENOSPC */
	}
	r->file = *file;
	r->start = start;
	r->nr = nr;
	r->time_ns = ctx->time_ns;
	r->cgroup_id = ctx->cgroup_id;
	r->code = code;
	r->kind = kind;
	r->node = node == PAGECACHE_NODE_ANY ? ctx->node : node;
	r->tgid = ctx->tgid;
	r->tid = ctx->tid;
	r->message[0] = 0;
	if (message)
		bpf_probe_read_kernel_str(r->message, sizeof(r->message), message);
	bpf_ringbuf_submit(r, 0);
	return nr;
}

/* Pages that memory allows to read ahead of this reader. */
static __always_inline u64 pagecache_allowed_ahead(const struct pagecache_ctx *ctx)
{
	u32 tgid = ctx->tgid;
	u64 *pages = bpf_map_lookup_elem(&windows, &tgid);

	return pages ? *pages : pages_of(ctx, PAGECACHE_AGENT_UNKNOWN_BYTES);
}

/* What of the pages from @ahead of the access on may be asked for. */
static __always_inline u64 agent_cut(const struct pagecache_ctx *ctx, u64 ahead, u64 nr)
{
	u64 allowed = pagecache_allowed_ahead(ctx);

	return ahead < allowed ? min_u64(nr, allowed - ahead) : 0;
}

/* The agent opens what is asked for: every tagged file can be named. */
static __always_inline bool pagecache_names_files(const struct pagecache_ctx *ctx)
{
	return true;
}

/*
 * Prefetch of any tagged file, which has so many pages.  The caller minds
 * pagecache_allowed_ahead(): only it knows how far ahead of the reader this is.
 */
static __always_inline s64 pagecache_prefetch_file(struct pagecache_ctx *ctx,
						   const struct pagecache_file_key *file, u64 pages,
						   u64 start, u64 nr, s32 node)
{
	struct pagecache_agent_state *all = agent_state();
	struct pagecache_agent_orders *told = agent_orders();
	s64 accepted;
	u64 room;

	if (!all || !told || start >= pages || !nr)
		return -22; /* EINVAL */
	if (nr > pages - start)
		nr = pages - start;
	if (nr > pages_of(ctx, PAGECACHE_AGENT_MAX_EXTENT_BYTES))
		nr = pages_of(ctx, PAGECACHE_AGENT_MAX_EXTENT_BYTES);
	/* The same bound where pages have 4 KiB, as a number that the verifier makes use of. */
	if (nr > PAGECACHE_AGENT_MAX_EXTENT)
		nr = PAGECACHE_AGENT_MAX_EXTENT;
	room = all->asked - told->done;
	room = room < told->max_inflight ? told->max_inflight - room : 0;
	if (!room) {
		agent_count(PAGECACHE_COUNTER_refused_calls, 1);
		return -122; /* EDQUOT */
	}
	if (nr > room)
		nr = room;
	accepted = agent_request(ctx, file, PAGECACHE_REQUEST_PREFETCH, start, nr, node, 0, NULL);
	if (accepted < 0)
		return accepted;
	__sync_fetch_and_add(&all->asked, nr);
	agent_count(PAGECACHE_COUNTER_prefetch_calls, 1);
	agent_count(PAGECACHE_COUNTER_prefetch_bytes, nr << ctx->page_shift);
	return accepted;
}

/* Pages [start, start + nr) are asked for; marked, so that their reader tells of itself. */
static __always_inline void agent_asked_for(struct agent_cursor *cursor, u64 start, u64 nr,
					    u64 read_to, u32 mark_step)
{
	if (start <= cursor->to && start + nr >= cursor->from) {
		cursor->from = start < cursor->from ? start : cursor->from;
		cursor->to = start + nr > cursor->to ? start + nr : cursor->to;
	} else {
		cursor->from = start;
		cursor->to = start + nr;
		cursor->mark = 0;
	}
	if (mark_step) {
		cursor->step = mark_step;
		if (cursor->mark < read_to)
			cursor->mark = start > read_to ? start : read_to;
	}
}

/*
 * A part of a policy that the verifier goes through once, not with each way that leads there.  It
 * is given maps' values and the context, each of which may be NULL to the verifier.
 */
#define PAGECACHE_STEP __noinline

PAGECACHE_STEP s64 agent_prefetch(struct agent_call *call, u64 start, u64 nr, s32 node,
				  u32 mark_step)
{
	struct pagecache_ctx *ctx;
	struct agent_cursor *cursor;
	s64 accepted;
	u64 end;

	if (!call)
		return -22;
	if (call->random)
		return 0;
	ctx = &call->ctx;
	end = ctx->index + ctx->nr;
	nr = agent_cut(ctx, start > end ? start - end : 0, nr);
	accepted = pagecache_prefetch_file(ctx, &call->key.file, ctx->file_pages, start, nr, node);
	if (accepted <= 0)
		return accepted;
	cursor = agent_cursor_of(&call->key);
	if (cursor)
		agent_asked_for(cursor, start, accepted, end, mark_step);
	return accepted;
}

static __always_inline s64 pagecache_prefetch(struct pagecache_ctx *ctx, u64 start, u64 nr,
					      s32 node, u32 mark_step)
{
	return agent_prefetch(agent_call_of(ctx), start, nr, node, mark_step);
}

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct sched_entity___run {
	u64 sum_exec_runtime;
};

struct sched_info___run {
	unsigned long long run_delay;
};

struct task_struct___run {
	struct sched_entity___run se;
	struct sched_info___run sched_info;
};
#pragma clang attribute pop

/* How long the reader's thread has run or waited for a CPU, and so did not wait for pages. */
static __always_inline u64 pagecache_reader_busy_ns(void)
{
	struct task_struct___run *task = (void *)bpf_get_current_task();
	u64 delay = 0;

	if (bpf_core_field_exists(task->sched_info.run_delay))
		delay = LOAD(task, sched_info.run_delay);
	return LOAD(task, se.sum_exec_runtime) + delay;
}

/* Whether the reader has asked not to be read ahead of: madvise(2), posix_fadvise(2). */
static __always_inline bool pagecache_reads_at_random(const struct pagecache_ctx *ctx)
{
	return ((const struct agent_call *)ctx)->random;
}

/*
 * Pages of this file that its reader has accessed so far, each as often as it was;
 * PAGECACHE_UNKNOWN where the engine does not see all accesses.  Of huge pages that are mapped
 * whole none is seen.
 */
static __always_inline u64 pagecache_touched(const struct pagecache_ctx *ctx)
{
	return ((const struct agent_call *)ctx)->touched;
}

/* The reader does not stream after all: its accesses are told of one by one again. */
static __always_inline void pagecache_forget_reader(struct pagecache_ctx *ctx)
{
	agent_call_of(ctx)->forget = 1;
}

/* The file of the model that comes after this one, by name; returns its pages, 0 without one. */
static __always_inline u64 pagecache_next_file(struct pagecache_ctx *ctx,
					       struct pagecache_file_key *next)
{
	struct pagecache_file_key file = agent_call_of(ctx)->key.file;
	struct pagecache_agent_tag *tag = bpf_map_lookup_elem(&tags, &file);

	if (!tag)
		return 0;
	*next = tag->next;
	return tag->next_pages;
}

/* Prefetch of that file on behalf of the same reader. */
static __always_inline s64 pagecache_prefetch_next(struct pagecache_ctx *ctx, u64 start, u64 nr,
						   s32 node, u32 mark_step)
{
	struct agent_call *call = agent_call_of(ctx);
	struct agent_cursor_key key = { .consumer = call->key.consumer };
	u64 pages = pagecache_next_file(ctx, &key.file);
	u64 end = ctx->index + ctx->nr;
	u64 left = ctx->file_pages > end ? ctx->file_pages - end : 0;
	struct agent_cursor *cursor;
	s64 accepted;

	nr = agent_cut(ctx, left + start, nr);
	accepted = pagecache_prefetch_file(ctx, &key.file, pages, start, nr, node);
	if (accepted <= 0)
		return accepted;
	cursor = agent_cursor_of(&key);
	if (cursor)
		agent_asked_for(cursor, start, accepted, start ? 0 : mark_step, mark_step);
	return accepted;
}

static __always_inline s64 pagecache_drop_file(struct pagecache_ctx *ctx,
					       const struct pagecache_file_key *file, u64 pages,
					       u64 start, u64 nr)
{
	if (start >= pages || !nr)
		return -22;
	if (nr > pages - start)
		nr = pages - start;
	agent_count(PAGECACHE_COUNTER_drop_calls, 1);
	return agent_request(ctx, file, PAGECACHE_REQUEST_DROP, start, nr, PAGECACHE_NODE_ANY, 0,
			     NULL);
}

static __always_inline s64 pagecache_drop(struct pagecache_ctx *ctx, u64 start, u64 nr)
{
	return pagecache_drop_file(ctx, &agent_call_of(ctx)->key.file, ctx->file_pages, start, nr);
}

static __always_inline s64 pagecache_cancel(struct pagecache_ctx *ctx)
{
	return agent_request(ctx, &agent_call_of(ctx)->key.file, PAGECACHE_REQUEST_CANCEL, 0, 0,
			     PAGECACHE_NODE_ANY, 0, NULL);
}

/* Nothing is kept here: EOPNOTSUPP. */
static __always_inline s64 pagecache_keep_budget(struct pagecache_ctx *ctx, u64 pages)
{
	return -95;
}

static __always_inline void pagecache_exit(struct pagecache_ctx *ctx, s64 code, const char *message)
{
	struct pagecache_agent_state *all = agent_state();

	if (all && !all->ended) {
		all->ended = 1;
		agent_request(ctx, &agent_call_of(ctx)->key.file, PAGECACHE_REQUEST_EXIT,
			      agent_call_of(ctx)->hook, 0, PAGECACHE_NODE_ANY, code, message);
	}
}

#endif /* AGENT_CALLS_BPF_H */
