// SPDX-License-Identifier: GPL-2.0-only
/* read.c - submits reads: in the task that wants them, or on another NUMA node for it. */
#include <linux/pagemap.h>
#include <linux/sched/signal.h>
#include <linux/static_call.h>

#include "hooks.h"
#include "prefetch.h"
#include "streams.h"

#define PCB_SUBMIT_TIMEOUT (HZ / 4)

static void pcb_no_ra_order(PCB_RA_ORDER_ARGS)
{
}

DEFINE_STATIC_CALL(pcb_ra_order, pcb_no_ra_order);

/* page_cache_ra_order() is not exported. */
int pcb_read_prepare(void)
{
	unsigned long addr = pcb_symbol("page_cache_ra_order");

	if (!addr)
		return -ENOENT;
	static_call_update(pcb_ra_order, (typeof(&pcb_no_ra_order))addr);
	return 0;
}

/* The kernel's own function, with its own arguments. */
void pcb_ra_order_original(PCB_RA_ORDER_ARGS)
{
	static_call(pcb_ra_order)(PCB_RA_ORDER_NAMES);
}

/* The order of folios to read; where the policy leaves it open, 256 KiB if the plan is as large. */
static unsigned int pcb_order_of(const struct pcb_plan *plan)
{
	if (plan->order != PAGECACHE_ORDER_AUTO)
		return plan->order;
	return plan->nr >= PCB_FOLIO_PAGES ? ilog2(PCB_FOLIO_PAGES) : min(2, ilog2(plan->nr));
}

/* Reads a plan in pieces; a piece is submitted before the next is allocated. */
void pcb_read_here(struct file *file, struct address_space *mapping, const struct pcb_plan *plan)
{
	pgoff_t start = plan->start, end = start + plan->nr;

	while (start < end && !fatal_signal_pending(current)) {
		loff_t size = i_size_read(mapping->host);
		unsigned long nr = pcb_piece_end(start, end, PCB_CHUNK_PAGES) - start;
		struct file_ra_state ra = { .start = start, .ra_pages = file->f_ra.ra_pages };
		DEFINE_READAHEAD(ractl, file, &ra, mapping, start);

		/* The file may have been truncated since the answer was clamped. */
		if (!size || start > (size - 1) >> PAGE_SHIFT)
			return;
		nr = min_t(unsigned long, nr, ((size - 1) >> PAGE_SHIFT) - start + 1);
		ra.size = nr;
		if (plan->mark >= start && plan->mark < start + nr)
			ra.async_size = start + nr - plan->mark;
		pcb_ractl_set_dropbehind(&ractl, plan->dropbehind);
		pcb_ra_order_call(static_call(pcb_ra_order), &ractl, &ra, pcb_order_of(plan));
		start += nr;
		cond_resched_tasks_rcu_qs();
	}
}

static struct pcb_extent pcb_extent_of(const struct pcb_plan *plan)
{
	return (struct pcb_extent){
		.op = PCB_OP_READ,
		.start = plan->start,
		.end = plan->start + plan->nr,
		.mark = plan->mark,
		.order = plan->order,
		.dropbehind = plan->dropbehind,
	};
}

/*
 * Reads for a reader whose answer names another node.  A worker there allocates and submits, in
 * front of all that is queued; the reader waits until that is done (not for the data).  Returns
 * false when it was not done, or not in time: then the reader has to read.
 */
bool pcb_read_on_node(struct pcb_policy *p, struct file *file, const struct pcb_plan *plan)
{
	struct pcb_extent extent = pcb_extent_of(plan);

	extent.demand = true;
	if (pcb_enqueue(p, file, plan->node, &extent)) {
		pcb_count(p, refused_calls, 1);
		return false;
	}
	/* A read that must not block (IOCB_NOWAIT) comes with this flag set. */
	if (current->flags & PF_MEMALLOC_NOIO)
		return true;
	return wait_event_killable_timeout(pcb_progress, !pcb_demand_pending(file, plan->node),
					   PCB_SUBMIT_TIMEOUT);
}

/* Reads a plan by a worker, and goes on at once. */
void pcb_read_later(struct pcb_policy *p, struct file *file, const struct pcb_plan *plan)
{
	struct pcb_extent extent = pcb_extent_of(plan);

	if (pcb_enqueue(p, file, plan->node, &extent))
		pcb_count(p, refused_calls, 1);
}
