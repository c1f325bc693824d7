/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * engine_agent.bpf.h - policies on tracepoints, for kernels that take no module.
 *
 * The hooks become functions of programs on raw tracepoints; what a policy asks for goes through a
 * ring buffer to a process, the agent, which reads the pages with ordinary system calls.
 *
 * The kernel's own readahead goes on, so `readahead` is not asked in the kernel's place: it is
 * called at the same moments, and an overriding answer is one more request.  Those moments are
 * made from what tracepoints tell: an access outside of what has been asked for counts as a miss
 * or a fault, and one that passes a place marked by pagecache_prefetch() as a marker.  Answered
 * markers and orders are not honoured; tracepoints do not know the open file, so one process has
 * one file_id per file.
 */
#ifndef ENGINE_AGENT_BPF_H
#define ENGINE_AGENT_BPF_H

#include "core.bpf.h"

/* Beside what it answers, the kernel reads for the reader by itself. */
#define PAGECACHE_KERNEL_READS 1

#define PAGECACHE_AGENT_MAX_EXTENT (1U << 18) /* pages of one request */

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
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct agent_cursor_key);
	__type(value, struct agent_cursor);
} cursors SEC(".maps");

static const struct agent_cursor agent_no_cursor;

/* One call of a hook; a policy sees ctx only. */
struct agent_call {
	struct pagecache_ctx ctx;
	struct agent_cursor_key key;
	struct pagecache_agent_tag *tag;
	struct agent_cursor *cursor;
	u32 hook; /* enum pagecache_hook */
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
	u64 *pages = bpf_map_lookup_elem(&windows, &ctx->tgid);

	return pages ? *pages : ~0ULL;
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

static __always_inline s64 pagecache_prefetch(struct pagecache_ctx *ctx, u64 start, u64 nr,
					      s32 node, u32 mark_step)
{
	struct agent_call *call = agent_call_of(ctx);
	struct agent_cursor *cursor = call->cursor;
	s64 accepted =
		pagecache_prefetch_file(ctx, &call->key.file, ctx->file_pages, start, nr, node);

	if (accepted > 0 && cursor) {
		nr = accepted;
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
			if (cursor->mark < ctx->index + ctx->nr)
				cursor->mark = start > ctx->index ? start : ctx->index + ctx->nr;
		}
	}
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

static __always_inline void pagecache_exit(struct pagecache_ctx *ctx, s64 code, const char *message)
{
	struct pagecache_agent_state *all = agent_state();

	if (all && !all->ended) {
		all->ended = 1;
		agent_request(ctx, &agent_call_of(ctx)->key.file, PAGECACHE_REQUEST_EXIT,
			      agent_call_of(ctx)->hook, 0, PAGECACHE_NODE_ANY, code, message);
	}
}

#define PAGECACHE_HOOK_1(ret, fn, type) static __always_inline ret fn
#define PAGECACHE_HOOK_2(ret, fn, type1, type2) static __always_inline ret fn

struct bpf_pidns_info {
	u32 pid;
	u32 tgid;
};

static __always_inline bool agent_itself(void)
{
	struct bpf_pidns_info ids = {};

	return !bpf_get_ns_current_pid_tgid(agent_pidns_dev, agent_pidns_ino, &ids, sizeof(ids)) &&
	       bpf_map_lookup_elem(&own, &ids.tgid);
}

/* Fills in a call; false: the file is not tagged. */
static __always_inline bool agent_begin(struct agent_call *call, struct inode *inode)
{
	struct super_block *sb = BPF_CORE_READ(inode, i_sb);
	struct pagecache_ctx *ctx = &call->ctx;
	struct pagecache_agent_orders *told;
	struct pagecache_agent_state *all;
	u32 dev = BPF_CORE_READ(sb, s_dev);
	u64 ids;

	__builtin_memset(call, 0, sizeof(*call));
	call->key.file.ino = BPF_CORE_READ(inode, i_ino);
	call->key.file.dev_major = dev >> 20;
	call->key.file.dev_minor = dev & 0xfffff;
	call->key.file.generation = BPF_CORE_READ(inode, i_generation);
	call->tag = bpf_map_lookup_elem(&tags, &call->key.file);
	if (!call->tag)
		return false;
	all = agent_state();
	told = agent_orders();
	if (!all || !told || all->ended)
		return false;

	ids = bpf_get_current_pid_tgid();
	ctx->ino = call->key.file.ino;
	ctx->dev_major = call->key.file.dev_major;
	ctx->dev_minor = call->key.file.dev_minor;
	ctx->generation = call->key.file.generation;
	ctx->tgid = ids >> 32;
	ctx->tid = (u32)ids;
	ctx->file_id = ctx->tgid;
	ctx->page_shift = agent_page_shift;
	ctx->file_pages = (BPF_CORE_READ(inode, i_size) + (1ULL << (agent_page_shift & 31)) - 1) >>
			  (agent_page_shift & 31);
	ctx->resident_pages = BPF_CORE_READ(inode, i_mapping, nrpages);
	ctx->governed_pages = all->governed + told->governed;
	ctx->inflight_pages = all->asked - told->done;
	ctx->time_ns = bpf_ktime_get_ns();
	ctx->cgroup_id = bpf_get_current_cgroup_id();
	ctx->model = call->tag->model;
	ctx->node = bpf_get_numa_node_id();
	ctx->ra_pages = BPF_CORE_READ(sb, s_bdi, ra_pages);
	ctx->io_pages = BPF_CORE_READ(sb, s_bdi, io_pages);

	call->key.consumer = ctx->tgid;
	call->cursor = bpf_map_lookup_elem(&cursors, &call->key);
	if (!call->cursor) {
		bpf_map_update_elem(&cursors, &call->key, &agent_no_cursor, BPF_NOEXIST);
		call->cursor = bpf_map_lookup_elem(&cursors, &call->key);
	}
	return call->cursor != NULL;
}

static __always_inline void agent_ask(const struct pagecache_ops *policy, struct agent_call *call,
				      u32 kind)
{
	struct pagecache_answer answer = {
		.mark = PAGECACHE_NO_MARK,
		.node = PAGECACHE_NODE_ANY,
		.order = PAGECACHE_ORDER_AUTO,
	};
	struct pagecache_ctx *ctx = &call->ctx;
	s32 verdict;

	ctx->kind = kind;
	call->hook = PAGECACHE_HOOK_READAHEAD;
	agent_count(PAGECACHE_COUNTER_readahead_calls, 1);
	if (kind == PAGECACHE_KIND_MISS)
		agent_count(PAGECACHE_COUNTER_readahead_miss, 1);
	else if (kind == PAGECACHE_KIND_FAULT)
		agent_count(PAGECACHE_COUNTER_readahead_fault, 1);
	else
		agent_count(PAGECACHE_COUNTER_readahead_marker, 1);
	if (ctx->flags & PAGECACHE_F_LATE)
		agent_count(PAGECACHE_COUNTER_readahead_late, 1);
	verdict = policy->readahead(ctx, &answer);
	if (verdict == PAGECACHE_OVERRIDE) {
		agent_count(PAGECACHE_COUNTER_readahead_override, 1);
		/* The kernel reads by itself what the reader waits for. */
		if (answer.nr > ctx->nr)
			pagecache_prefetch(ctx, answer.start, answer.nr, answer.node, 0);
	} else if (verdict == PAGECACHE_DEFAULT) {
		agent_count(PAGECACHE_COUNTER_readahead_default, 1);
	} else {
		agent_count(PAGECACHE_COUNTER_invalid_answers, 1);
	}
}

/* A range of a file is read or faulted by this task. */
static __always_inline int agent_accessed(const struct pagecache_ops *policy, struct inode *inode,
					  u64 index, u64 end, u32 access)
{
	bool fault = access != PAGECACHE_KIND_READ;
	struct agent_call call;
	struct agent_cursor *c;

	if (!inode || !agent_begin(&call, inode) || agent_itself())
		return 0;
	if (end > call.ctx.file_pages)
		end = call.ctx.file_pages;
	if (index >= end)
		return 0;
	call.ctx.index = index;
	call.ctx.nr = end - index;
	c = call.cursor;

	if (policy->access) {
		call.ctx.kind = access;
		call.hook = PAGECACHE_HOOK_ACCESS;
		agent_count(PAGECACHE_COUNTER_access_calls, 1);
		policy->access(&call.ctx);
	}
	/* Nothing to read ahead of. */
	if (!policy->readahead || call.ctx.resident_pages >= call.ctx.file_pages)
		return 0;
	if (index < c->from || index >= c->to) {
		agent_ask(policy, &call, fault ? PAGECACHE_KIND_FAULT : PAGECACHE_KIND_MISS);
	} else if (c->mark && end > c->mark) {
		/* Past the marks of this access. */
		c->mark += (end - c->mark + c->step - 1) / c->step * c->step;
		if (end > call.tag->done)
			call.ctx.flags |= PAGECACHE_F_LATE;
		agent_ask(policy, &call,
			  fault ? PAGECACHE_KIND_FAULT_MARKER : PAGECACHE_KIND_MARKER);
	}
	return 0;
}

static __always_inline int agent_moved(const struct pagecache_ops *policy, struct folio *folio,
				       bool added)
{
	struct inode *inode = BPF_CORE_READ(folio, mapping, host);
	struct pagecache_agent_state *all = agent_state();
	struct agent_call call;
	u64 bytes;

	if (!inode || !all || !agent_begin(&call, inode))
		return 0;
	call.ctx.index = BPF_CORE_READ(folio, index);
	call.ctx.nr = folio_pages(folio);
	call.hook = added ? PAGECACHE_HOOK_ADDED : PAGECACHE_HOOK_REMOVED;
	bytes = call.ctx.nr << (agent_page_shift & 31);
	__sync_fetch_and_add(&all->governed, added ? call.ctx.nr : -call.ctx.nr);
	agent_count(added ? PAGECACHE_COUNTER_added_bytes : PAGECACHE_COUNTER_removed_bytes, bytes);
	if (added && policy->added)
		policy->added(&call.ctx);
	else if (!added && policy->removed)
		policy->removed(&call.ctx);
	return 0;
}

/* Returns what init returned; an exit that it asks for lies in the ring buffer. */
static __always_inline int agent_start(const struct pagecache_ops *policy)
{
	struct agent_call call;

	if (!policy->init)
		return 0;
	__builtin_memset(&call, 0, sizeof(call));
	call.ctx.page_shift = agent_page_shift;
	call.ctx.node = -1;
	call.ctx.time_ns = bpf_ktime_get_ns();
	return policy->init(&call.ctx);
}

/* Programs of tracepoints that this kernel does not have are not loaded. */
#define PAGECACHE_TABLE(policy, ...)                                                        \
	static const struct pagecache_ops policy##_ops = { __VA_ARGS__ };                   \
	SEC("raw_tp/mm_filemap_get_pages") int agent_get_pages(u64 *args)                   \
	{                                                                                   \
		struct address_space *mapping = (void *)args[0];                            \
		return agent_accessed(&policy##_ops, BPF_CORE_READ(mapping, host), args[1], \
				      args[2] + 1, PAGECACHE_KIND_READ);                    \
	}                                                                                   \
	SEC("raw_tp/mm_filemap_map_pages") int agent_map_pages(u64 *args)                   \
	{                                                                                   \
		struct address_space *mapping = (void *)args[0];                            \
		return agent_accessed(&policy##_ops, BPF_CORE_READ(mapping, host), args[1], \
				      args[2] + 1, PAGECACHE_KIND_MAP);                     \
	}                                                                                   \
	SEC("raw_tp/mm_filemap_fault") int agent_fault(u64 *args)                           \
	{                                                                                   \
		struct address_space *mapping = (void *)args[0];                            \
		return agent_accessed(&policy##_ops, BPF_CORE_READ(mapping, host), args[1], \
				      args[1] + 1, PAGECACHE_KIND_TOUCH);                   \
	}                                                                                   \
	SEC("raw_tp/mm_filemap_add_to_page_cache") int agent_added(u64 *args)               \
	{                                                                                   \
		return agent_moved(&policy##_ops, (void *)args[0], true);                   \
	}                                                                                   \
	SEC("raw_tp/mm_filemap_delete_from_page_cache") int agent_removed(u64 *args)        \
	{                                                                                   \
		return agent_moved(&policy##_ops, (void *)args[0], false);                  \
	}                                                                                   \
	/* Run by the agent before anything is attached. */                                 \
	SEC("syscall") int agent_init(void *unused)                                         \
	{                                                                                   \
		return agent_start(&policy##_ops);                                          \
	}

#endif /* ENGINE_AGENT_BPF_H */
