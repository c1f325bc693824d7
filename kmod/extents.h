/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * extents.h - a queue of extents of one file, taken off in pieces.
 *
 * Knows pages only: tests/unit/test_kmod_pure.py compiles it for user space.
 */
#ifndef PCB_EXTENTS_H
#define PCB_EXTENTS_H

#include <linux/types.h>

#define PCB_QUEUE_EXTENTS 64

enum pcb_op { PCB_OP_READ, PCB_OP_DROP };

struct pcb_extent {
	pgoff_t start;
	pgoff_t end;
	pgoff_t mark; /* next page to get a readahead marker, or PAGECACHE_NO_MARK */
	u32 mark_step; /* pages from one marker to the next; 0: no other */
	u32 order; /* of folios, or PAGECACHE_ORDER_AUTO */
	enum pcb_op op;
	bool demand; /* a reader is waiting for it */
	bool dropbehind; /* see plan.h */
};

struct pcb_queue {
	unsigned int first, count;
	u64 demand; /* pages that readers are waiting for */
	struct pcb_extent extents[PCB_QUEUE_EXTENTS];
};

bool pcb_queue_push(struct pcb_queue *queue, const struct pcb_extent *extent);
bool pcb_queue_push_front(struct pcb_queue *queue, const struct pcb_extent *extent);
struct pcb_extent pcb_queue_pop(struct pcb_queue *queue, unsigned long read_pages,
				unsigned long drop_pages);
u64 pcb_queue_clear(struct pcb_queue *queue);
pgoff_t pcb_piece_end(pgoff_t start, pgoff_t end, unsigned long multiple);

#endif /* PCB_EXTENTS_H */
