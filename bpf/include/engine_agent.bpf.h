/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * engine_agent.bpf.h - policies on the kernel's events, for kernels that take no module.
 *
 * The hooks become functions of programs on raw tracepoints, or on functions of the page cache
 * where tracepoints are missing (access_events.bpf.h); what a policy asks for goes through a ring
 * buffer to a process, the agent, which reads the pages with ordinary system calls.
 *
 * The kernel's own readahead goes on, so `readahead` is not asked in the kernel's place: it is
 * called at the same moments, and an overriding answer is one more request.  Those moments are
 * made from what tracepoints tell: an access outside of what has been asked for counts as a miss
 * or a fault, and one that passes a place marked by pagecache_prefetch() as a marker.  Answered
 * markers and orders are not honored; tracepoints do not know the open file, so one process has
 * one file_id per file.
 *
 * evict is never asked: only the module can answer reclaim.  pressure is asked by the agent, when
 * it learns that memory is short.
 */
#ifndef ENGINE_AGENT_BPF_H
#define ENGINE_AGENT_BPF_H

#include "core.bpf.h"
#include "access_events.bpf.h"
#include "advice.bpf.h"
#include "affinity.bpf.h"
#include "agent_calls.bpf.h"
#include "reading_thread.bpf.h"

#define PAGECACHE_HOOK_1(ret, fn, type) static __always_inline ret fn
#define PAGECACHE_HOOK_2(ret, fn, type1, type2) static __always_inline ret fn

#define AGENT_READ_BYTES (2 << 20) /* of a read() that are told of at once */

/* The read() that a thread is in. */
struct agent_read {
	struct pagecache_file_key file;
	u64 at; /* it has come to here, */
	u64 end; /* and ends here; */
	u64 told; /* the policy has been told of what comes before this */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, u64); /* tgid and tid */
	__type(value, struct agent_read);
} reads SEC(".maps");

static __always_inline bool agent_itself(void)
{
	struct bpf_pidns_info ids = {};
	union thread_name name = {};

	bpf_get_current_comm(&name, sizeof(name));
	if (is_reading_thread(&name))
		return true;
	return !bpf_get_ns_current_pid_tgid(agent_pidns_dev, agent_pidns_ino, &ids, sizeof(ids)) &&
	       bpf_map_lookup_elem(&own, &ids.tgid);
}

/*
 * Room for what is told of an access.  On the stack it would leave too little of the 512 bytes that
 * the verifier of many kernels gives a program and all functions below it.  A thread that is
 * preempted here keeps its place, so there are some for each CPU.
 */
struct agent_place {
	u32 taken;
	u32 reserved;
	struct agent_call call;
	struct agent_read read;
};

#define AGENT_PLACES 4

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, AGENT_PLACES);
	__type(key, u32);
	__type(value, struct agent_place);
} places SEC(".maps");

/* NULL: all are taken. */
static __always_inline struct agent_place *agent_take_place(void)
{
	struct agent_place *place;
	u32 i;

	for (i = 0; i < AGENT_PLACES; i++) {
		u32 at = i;

		place = bpf_map_lookup_elem(&places, &at);
		if (place && !__sync_lock_test_and_set(&place->taken, 1))
			return place;
	}
	return NULL;
}

/*
 * NULL: the file is not tagged.  A Bloom-like prefilter by inode number, which every read of any
 * file asks; agent_begin() looks up what it lets through.
 */
static __always_inline struct inode *agent_maybe_tagged(struct address_space *mapping, u64 *ino)
{
	struct inode *inode = host_of(mapping, ino);
	u32 word = inode_word(*ino);

	return inode_in(bpf_map_lookup_elem(&inode_bits, &word), *ino) ? inode : NULL;
}

/* The tag of a file, NULL if it has none; fills in the file's identity. */
static __always_inline struct pagecache_agent_tag *agent_tag_of(struct pagecache_file_key *file,
								struct inode *inode, u64 ino)
{
	u32 dev = device_of(inode, LOAD(inode, i_sb));

	file->ino = ino;
	file->dev_major = dev >> 20;
	file->dev_minor = dev & 0xfffff;
	file->generation = LOAD(inode, i_generation);
	file->reserved = 0;
	return bpf_map_lookup_elem(&tags, file);
}

/* Fills in a call; NULL: the file is not tagged. */
static __always_inline struct pagecache_agent_tag *agent_begin(struct agent_call *call,
							       struct inode *inode, u64 ino)
{
	struct pagecache_ctx *ctx = &call->ctx;
	struct pagecache_agent_orders *told;
	struct pagecache_agent_state *all;
	struct pagecache_agent_tag *tag;
	struct super_block *sb;
	u64 ids;

	__builtin_memset(call, 0, sizeof(*call));
	tag = agent_tag_of(&call->key.file, inode, ino);
	if (!tag)
		return NULL;
	sb = LOAD(inode, i_sb);
	all = agent_state();
	told = agent_orders();
	if (!all || !told || all->ended)
		return NULL;

	ids = bpf_get_current_pid_tgid();
	ctx->ino = call->key.file.ino;
	ctx->dev_major = call->key.file.dev_major;
	ctx->dev_minor = call->key.file.dev_minor;
	ctx->generation = call->key.file.generation;
	ctx->tgid = ids >> 32;
	ctx->tid = (u32)ids;
	ctx->file_id = ctx->tgid;
	ctx->page_shift = agent_page_shift;
	ctx->file_pages = (LOAD(inode, i_size) + (1ULL << (agent_page_shift & 31)) - 1) >>
			  (agent_page_shift & 31);
	ctx->resident_pages = LOAD(inode, i_mapping, nrpages);
	ctx->governed_pages = all->governed + told->governed;
	ctx->inflight_pages = all->asked - told->done;
	ctx->time_ns = bpf_ktime_get_ns();
	ctx->cgroup_id = bpf_get_current_cgroup_id();
	ctx->model = tag->model;
	ctx->node = consumer_node(ctx->tgid, bpf_get_numa_node_id());
	ctx->ra_pages = LOAD(sb, s_bdi, ra_pages);
	ctx->io_pages = LOAD(sb, s_bdi, io_pages);

	call->key.consumer = ctx->tgid;
	return tag;
}

/* Asks the policy's hook for a window; ctx.kind says on which occasion. */
static __always_inline void agent_ask(const struct pagecache_ops *policy, struct agent_call *call)
{
	struct pagecache_answer answer = {
		.mark = PAGECACHE_NO_MARK,
		.node = PAGECACHE_NODE_ANY,
		.order = PAGECACHE_ORDER_AUTO,
	};
	struct pagecache_ctx *ctx = &call->ctx;
	u32 kind = ctx->kind;
	s32 verdict;

	if (!policy->readahead)
		return;
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

/*
 * A read() is seen as often as it finds some folios in the page cache (31 at a time), each time
 * with all that is left of it.  Cut the range to what the policy has not been told of yet and the
 * reader is about to read; false: that is nothing.
 */
static __always_inline bool agent_rest(struct agent_place *place, u64 *index, u64 *end)
{
	u64 id = bpf_get_current_pid_tgid();
	struct agent_read *r = bpf_map_lookup_elem(&reads, &id);
	struct agent_read *now = &place->read;
	u64 from = *index;

	now->file = place->call.key.file;
	now->at = *index;
	now->end = *end;
	if (r && r->end == *end && *index > r->at && pagecache_same_file(&now->file, &r->file)) {
		r->at = *index;
		if (*index < r->told)
			return false;
		from = r->told;
	}
	if (*end > *index + (AGENT_READ_BYTES >> agent_page_shift))
		*end = *index + (AGENT_READ_BYTES >> agent_page_shift);
	*index = from;
	now->told = *end;
	bpf_map_update_elem(&reads, &id, now, BPF_ANY);
	return true;
}

/* Count what this access has come to; a fault that is tried again has come to nothing. */
static __always_inline void agent_touched(struct agent_cursor *cursor, u64 index, u64 end)
{
	bool again = index < cursor->last_end && end > cursor->last_start;
	u64 below = again && index < cursor->last_start ? cursor->last_start - index : 0;
	u64 above = again && end > cursor->last_end ? end - cursor->last_end : 0;

	cursor->touched += again ? below + above : end - index;
	cursor->last_start = index;
	cursor->last_end = end;
}

/*
 * A range of a file is read or faulted by this task.  access, ask: the policy's hooks, as global
 * functions: the verifier goes through each once, not again with each way that leads there.
 */
static __always_inline void
agent_tell(const struct pagecache_ops *policy, int (*access)(struct agent_call *),
	   int (*ask)(struct agent_call *), struct address_space *mapping,
	   struct agent_place *place, struct pagecache_agent_tag *tag, u64 index, u64 end, u32 kind)
{
	bool fault = kind != PAGECACHE_KIND_READ;
	struct agent_call *call = &place->call;
	struct agent_cursor *c;
	u64 at = index;

	if (end > call->ctx.file_pages)
		end = call->ctx.file_pages;
	if (index >= end)
		return;
	if (!fault && end - index > 1 && !agent_rest(place, &index, &end))
		return;
	call->ctx.index = index;
	call->ctx.nr = end - index;
	c = agent_cursor_of(&call->key);
	if (!c)
		return;
	agent_touched(c, index, end);
	call->touched = c->touched;
	/* Of a mapping for random access nothing is read ahead, as the kernel does not. */
	call->random = fault && (policy->readahead || policy->access) &&
		       advised_random(mapping, at, agent_page_shift);

	if (policy->access) {
		call->ctx.kind = kind;
		call->hook = PAGECACHE_HOOK_ACCESS;
		agent_count(PAGECACHE_COUNTER_access_calls, 1);
		access(call);
	}
	if (!policy->readahead || call->random)
		return;
	/* Nothing to read ahead of; unless a window goes on into the next file. */
	if (call->ctx.resident_pages >= call->ctx.file_pages && !(c->mark && tag->next_pages))
		return;
	/* A window is kept ahead of where the reader is, whatever it has been told of. */
	if (c->to && at > index) {
		index = at;
		call->ctx.index = index;
		call->ctx.nr = end - index;
	}
	if (index < c->from || index >= c->to) {
		call->ctx.kind = fault ? PAGECACHE_KIND_FAULT : PAGECACHE_KIND_MISS;
		ask(call);
	} else if (c->mark && end > c->mark) {
		/* Past the marks of this access. */
		c->mark += (end - c->mark + c->step - 1) / c->step * c->step;
		if (end > tag->done)
			call->ctx.flags |= PAGECACHE_F_LATE;
		call->ctx.kind = fault ? PAGECACHE_KIND_FAULT_MARKER : PAGECACHE_KIND_MARKER;
		ask(call);
	}
	if (call->forget)
		c->from = c->to = c->mark = 0;
}

static __always_inline int agent_accessed(const struct pagecache_ops *policy,
					  int (*access)(struct agent_call *),
					  int (*ask)(struct agent_call *),
					  struct address_space *mapping, u64 index, u64 end,
					  u32 kind)
{
	struct pagecache_agent_tag *tag;
	struct agent_place *place;
	struct inode *inode;
	u64 ino;

	inode = agent_maybe_tagged(mapping, &ino);
	if (!inode)
		return 0;
	place = agent_take_place();
	if (!place)
		return 0;
	tag = agent_begin(&place->call, inode, ino);
	if (tag && !agent_itself())
		agent_tell(policy, access, ask, mapping, place, tag, index, end, kind);
	__sync_lock_test_and_set(&place->taken, 0);
	return 0;
}

/* Pages of a tagged file have come or gone: counted, and told to a policy that asks for it. */
static __always_inline int agent_moved(const struct pagecache_ops *policy, struct folio *folio,
				       bool added)
{
	struct pagecache_agent_state *all = agent_state();
	bool asked = added ? policy->added : policy->removed;
	struct pagecache_file_key file;
	struct agent_call call;
	struct inode *inode;
	u64 pages, ino;

	inode = agent_maybe_tagged(mapping_of(folio), &ino);
	if (!inode || !all)
		return 0;
	/* Most policies do not ask, and what they would be told costs more than the count. */
	if (asked ? !agent_begin(&call, inode, ino)
		  : !agent_tag_of(&file, inode, ino) || all->ended)
		return 0;
	pages = folio_pages(folio);
	__sync_fetch_and_add(&all->governed, added ? pages : -pages);
	agent_count(added ? PAGECACHE_COUNTER_added_bytes : PAGECACHE_COUNTER_removed_bytes,
		    pages << (agent_page_shift & 31));
	if (!asked)
		return 0;
	call.ctx.index = index_of(folio);
	call.ctx.nr = pages;
	call.hook = added ? PAGECACHE_HOOK_ADDED : PAGECACHE_HOOK_REMOVED;
	if (added)
		policy->added(&call.ctx);
	else
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

/* Memory is short: what of this file is to be dropped?  Returns 0, or ENOENT, EOPNOTSUPP. */
static __always_inline int agent_asked(const struct pagecache_ops *policy,
				       struct pagecache_agent_pressure *args)
{
	struct pagecache_agent_state *all = agent_state();
	struct pagecache_agent_orders *told = agent_orders();
	struct pagecache_pressure want = args->want;
	struct pagecache_agent_tag *tag;
	struct agent_call call;

	if (!policy->pressure)
		return -95;
	__builtin_memset(&call, 0, sizeof(call));
	call.key.file = args->file;
	tag = bpf_map_lookup_elem(&tags, &call.key.file);
	if (!tag || !all || !told || all->ended)
		return -2;
	call.hook = PAGECACHE_HOOK_PRESSURE;
	call.ctx.ino = args->file.ino;
	call.ctx.dev_major = args->file.dev_major;
	call.ctx.dev_minor = args->file.dev_minor;
	call.ctx.generation = args->file.generation;
	call.ctx.nr = want.pages;
	call.ctx.file_pages = args->file_pages;
	call.ctx.resident_pages = args->resident_pages;
	call.ctx.governed_pages = all->governed + told->governed;
	call.ctx.inflight_pages = all->asked - told->done;
	call.ctx.time_ns = bpf_ktime_get_ns();
	call.ctx.cgroup_id = want.cgroup_id;
	call.ctx.model = tag->model;
	call.ctx.kind = want.cgroup_id ? PAGECACHE_KIND_CGROUP : PAGECACHE_KIND_MACHINE;
	call.ctx.node = PAGECACHE_NODE_ANY;
	call.ctx.page_shift = agent_page_shift;
	agent_count(PAGECACHE_COUNTER_pressure_calls, 1);
	policy->pressure(&call.ctx, &want);
	return 0;
}

#define PAGECACHE_TABLE(policy, ...)                                                             \
	static const struct pagecache_ops policy##_ops = { __VA_ARGS__ };                        \
	__noinline int policy##_agent_access(struct agent_call *call)                            \
	{                                                                                        \
		if (call && policy##_ops.access)                                                 \
			policy##_ops.access(&call->ctx);                                         \
		return 0;                                                                        \
	}                                                                                        \
	__noinline int policy##_agent_readahead(struct agent_call *call)                         \
	{                                                                                        \
		if (call)                                                                        \
			agent_ask(&policy##_ops, call);                                          \
		return 0;                                                                        \
	}                                                                                        \
	static __always_inline int agent_reads(struct address_space *mapping, u64 from, u64 to)  \
	{                                                                                        \
		return agent_accessed(&policy##_ops, policy##_agent_access,                      \
				      policy##_agent_readahead, mapping, from, to,               \
				      PAGECACHE_KIND_READ);                                      \
	}                                                                                        \
	static __always_inline int agent_maps(struct address_space *mapping, u64 from, u64 to)   \
	{                                                                                        \
		return agent_accessed(&policy##_ops, policy##_agent_access,                      \
				      policy##_agent_readahead, mapping, from, to,               \
				      PAGECACHE_KIND_MAP);                                       \
	}                                                                                        \
	static __always_inline int agent_faults(struct address_space *mapping, u64 from, u64 to) \
	{                                                                                        \
		return agent_accessed(&policy##_ops, policy##_agent_access,                      \
				      policy##_agent_readahead, mapping, from, to,               \
				      PAGECACHE_KIND_TOUCH);                                     \
	}                                                                                        \
	ACCESS_PROGRAMS(agent, agent_page_shift, agent_reads, agent_maps, agent_faults)          \
	SEC("raw_tp/mm_filemap_add_to_page_cache") int agent_added(u64 *args)                    \
	{                                                                                        \
		return agent_moved(&policy##_ops, (void *)args[0], true);                        \
	}                                                                                        \
	SEC("raw_tp/mm_filemap_delete_from_page_cache") int agent_removed(u64 *args)             \
	{                                                                                        \
		return agent_moved(&policy##_ops, (void *)args[0], false);                       \
	}                                                                                        \
	/* Run by the agent before anything is attached. */                                      \
	SEC("syscall") int agent_init(void *unused)                                              \
	{                                                                                        \
		return agent_start(&policy##_ops);                                               \
	}                                                                                        \
	/* Run by the agent for each of its files when memory is short. */                       \
	SEC("syscall") int agent_pressure(struct pagecache_agent_pressure *args)                 \
	{                                                                                        \
		return agent_asked(&policy##_ops, args);                                         \
	}

#endif /* ENGINE_AGENT_BPF_H */
