// SPDX-License-Identifier: GPL-2.0-only
/* prefetch.c - what a policy asks for: reads and drops, carried out later by workers. */
#include "placement.h"
#include "prefetch.h"
#include "streams.h"

#define PCB_MIN_MARK_STEP 16 /* pages: a marker costs a call of the policy */

static s64 pcb_refuse(struct pcb_call *call, s64 err)
{
	pcb_count(call->policy, refused_calls, 1);
	return err;
}

s64 pcb_prefetch_queue(struct pcb_call *call, pgoff_t start, u64 nr, s32 node, u32 mark_step)
{
	struct pcb_policy *p = call->policy;
	u64 bound = pcb_mib_to_pages(pcb_max_inflight_mib);
	u64 inflight = max_t(s64, atomic64_read(&p->inflight), 0);
	struct pcb_extent extent = { .op = PCB_OP_READ, .order = PAGECACHE_ORDER_AUTO };
	int err;

	if (!call->file || start >= call->ctx.file_pages || !nr)
		return pcb_refuse(call, -EINVAL);
	if (inflight >= bound)
		return pcb_refuse(call, -EDQUOT);
	nr = min(nr, call->ctx.file_pages - start);
	nr = min_t(u64, nr, pcb_mib_to_pages(pcb_max_extent_mib));
	nr = min(nr, bound - inflight);
	if (!pcb_node_allowed(node))
		node = PAGECACHE_NODE_ANY;

	extent.start = start;
	extent.end = start + nr;
	extent.mark_step = mark_step ? max_t(u32, mark_step, PCB_MIN_MARK_STEP) : 0;
	extent.mark = mark_step ? start : PAGECACHE_NO_MARK;
	err = pcb_enqueue(p, call->file, node, &extent);
	if (err)
		return pcb_refuse(call, err);
	pcb_count(p, prefetch_calls, 1);
	pcb_count(p, prefetch_bytes, nr << PAGE_SHIFT);
	return nr;
}

/* Notes a drop in a pressure hook; the worker that called the hook carries it out. */
static s64 pcb_drop_note(struct pcb_call *call, pgoff_t start, u64 nr)
{
	struct pcb_drops *drops = call->drops;

	if (drops->nr == ARRAY_SIZE(drops->at))
		return pcb_refuse(call, -ENOSPC);
	drops->at[drops->nr].start = start;
	drops->at[drops->nr].end = start + nr;
	drops->nr++;
	pcb_count(call->policy, drop_calls, 1);
	return nr;
}

s64 pcb_drop_queue(struct pcb_call *call, pgoff_t start, u64 nr)
{
	struct pcb_extent extent = { .op = PCB_OP_DROP, .mark = PAGECACHE_NO_MARK };
	int err;

	if (start >= call->ctx.file_pages || !nr)
		return pcb_refuse(call, -EINVAL);
	nr = min(nr, call->ctx.file_pages - start);
	if (call->drops)
		return pcb_drop_note(call, start, nr);
	if (!call->file)
		return pcb_refuse(call, -EINVAL);
	extent.start = start;
	extent.end = start + nr;
	err = pcb_enqueue(call->policy, call->file, PAGECACHE_NODE_ANY, &extent);
	if (err)
		return pcb_refuse(call, err);
	pcb_count(call->policy, drop_calls, 1);
	return nr;
}
