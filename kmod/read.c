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

/* Reads a plan in pieces; a piece is submitted before the next is allocated. */
void pcb_read_here(struct file *file, struct address_space *mapping, const struct pcb_plan *plan)
{
	pgoff_t start = plan->start, end = start + plan->nr;
	unsigned int order = plan->order == PAGECACHE_ORDER_AUTO ? 0 : plan->order;

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
		pcb_ra_order_call(static_call(pcb_ra_order), &ractl, &ra, order);
		start += nr;
		cond_resched();
	}
}

/*
 * Reads for a reader whose answer names another node.  Its worker allocates and submits; the reader
 * waits until that is done (not for the data), or goes on by itself after a while.
 */
void pcb_read_on_node(struct pcb_policy *p, struct file *file, const struct pcb_plan *plan)
{
	struct pcb_extent extent = {
		.op = PCB_OP_READ,
		.start = plan->start,
		.end = plan->start + plan->nr,
		.mark = plan->mark,
		.order = plan->order,
	};

	if (pcb_enqueue(p, file, plan->node, &extent)) {
		pcb_count(p, refused_calls, 1);
		return;
	}
	/* A read that must not block (IOCB_NOWAIT) comes with this flag set. */
	if (current->flags & PF_MEMALLOC_NOIO)
		return;
	wait_event_killable_timeout(pcb_progress, pcb_stream_submitted(file, plan->node),
				    PCB_SUBMIT_TIMEOUT);
}
