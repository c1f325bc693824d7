/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * trace.h - the module's trace events: pagecache_bpf:pagecache_readahead, what a policy has
 * decided, and pagecache_bpf:pagecache_keep_refused, why reclaim was not told to keep a folio.
 *
 * They cost nothing while nobody listens (static keys).  Read them with ftrace, perf or bpftrace.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM pagecache_bpf

#if !defined(PCB_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define PCB_TRACE_H

#include <linux/tracepoint.h>

#include "call.h"
#include "plan.h"

#ifndef PCB_TRACE_ENUM
#define PCB_TRACE_ENUM
enum pcb_keep_refusal {
	PCB_KEEP_OVERRULED, /* reclaim makes no progress */
	PCB_KEEP_OVER_BUDGET,
	PCB_KEEP_NO_RECORD, /* no memory for the record of what is kept */
};
#endif

/* As the kernel's own trace events are laid out. */
/* clang-format off */
TRACE_EVENT(pagecache_readahead,
	TP_PROTO(const struct pcb_call *call, const struct pcb_plan *plan),
	TP_ARGS(call, plan),
	TP_STRUCT__entry(
		__array(char, policy, PAGECACHE_NAME_LEN)
		__field(u64, ino)
		__field(u32, dev_major)
		__field(u32, dev_minor)
		__field(u32, kind)
		__field(bool, decided)
		__field(u64, index)
		__field(u64, wanted)
		__field(u64, start)
		__field(u64, nr)
		__field(s64, mark)
		__field(s32, node)
		__field(s32, order)
	),
	TP_fast_assign(
		memcpy(__entry->policy, call->policy->name, PAGECACHE_NAME_LEN);
		__entry->ino = call->ctx.ino;
		__entry->dev_major = call->ctx.dev_major;
		__entry->dev_minor = call->ctx.dev_minor;
		__entry->kind = call->ctx.kind;
		__entry->decided = plan;
		__entry->index = call->ctx.index;
		__entry->wanted = call->ctx.nr;
		__entry->start = plan ? plan->start : 0;
		__entry->nr = plan ? plan->nr : 0;
		__entry->mark = plan && plan->mark != PAGECACHE_NO_MARK ? plan->mark : -1;
		__entry->node = plan ? plan->node : PAGECACHE_NODE_ANY;
		__entry->order = plan && plan->order != PAGECACHE_ORDER_AUTO ? plan->order : -1;
	),
	TP_printk("policy=%s dev=%u:%u ino=%llu kind=%s index=%llu wanted=%llu %s start=%llu nr=%llu "
		  "mark=%lld node=%d order=%d",
		  __entry->policy, __entry->dev_major, __entry->dev_minor, __entry->ino,
		  __print_symbolic(__entry->kind, { PAGECACHE_KIND_MISS, "miss" },
				   { PAGECACHE_KIND_FAULT, "fault" },
				   { PAGECACHE_KIND_FAULT_SEQ, "fault_seq" },
				   { PAGECACHE_KIND_MARKER, "marker" },
				   { PAGECACHE_KIND_FAULT_MARKER, "fault_marker" }),
		  __entry->index, __entry->wanted, __entry->decided ? "override" : "default",
		  __entry->start, __entry->nr, __entry->mark, __entry->node, __entry->order)
);

TRACE_EVENT(pagecache_keep_refused,
	TP_PROTO(const struct pcb_policy *policy, const struct address_space *mapping, u64 index,
		 unsigned long nr, enum pcb_keep_refusal reason),
	TP_ARGS(policy, mapping, index, nr, reason),
	TP_STRUCT__entry(
		__array(char, policy, PAGECACHE_NAME_LEN)
		__field(u64, ino)
		__field(u32, dev)
		__field(u64, index)
		__field(u64, nr)
		__field(u32, reason)
	),
	TP_fast_assign(
		memcpy(__entry->policy, policy->name, PAGECACHE_NAME_LEN);
		__entry->ino = mapping->host->i_ino;
		__entry->dev = mapping->host->i_sb->s_dev;
		__entry->index = index;
		__entry->nr = nr;
		__entry->reason = reason;
	),
	TP_printk("policy=%s dev=%u:%u ino=%llu index=%llu nr=%llu reason=%s", __entry->policy,
		  MAJOR(__entry->dev), MINOR(__entry->dev), __entry->ino, __entry->index,
		  __entry->nr,
		  __print_symbolic(__entry->reason, { PCB_KEEP_OVERRULED, "overruled" },
				   { PCB_KEEP_OVER_BUDGET, "over_budget" },
				   { PCB_KEEP_NO_RECORD, "no_record" }))
);

/* clang-format on */

#endif /* PCB_TRACE_H */

/* This part must be outside of the protection. */
#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
