// SPDX-License-Identifier: GPL-2.0-only
/* extents.c - a queue of extents: first in, first out, but for what a reader is waiting for. */
#include <linux/math.h>
#include <linux/minmax.h>

#include "extents.h"
#include "pagecache_abi.h"

static struct pcb_extent *pcb_queue_at(struct pcb_queue *queue, unsigned int i)
{
	return &queue->extents[(queue->first + i) % PCB_QUEUE_EXTENTS];
}

/* Whether @next goes on where @last ends, in the same way and with markers in the same rhythm. */
static bool pcb_extent_continues(const struct pcb_extent *last, const struct pcb_extent *next)
{
	if (last->op != next->op || last->end != next->start || last->order != next->order ||
	    last->mark_step != next->mark_step || last->demand != next->demand ||
	    last->dropbehind != next->dropbehind)
		return false;
	if (!next->mark_step)
		return next->mark == PAGECACHE_NO_MARK;
	return (next->start - last->mark) % next->mark_step == 0;
}

static u64 pcb_extent_demand(const struct pcb_extent *extent)
{
	return extent->demand ? extent->end - extent->start : 0;
}

/* Returns false when the queue is full. */
bool pcb_queue_push(struct pcb_queue *queue, const struct pcb_extent *extent)
{
	struct pcb_extent *last = queue->count ? pcb_queue_at(queue, queue->count - 1) : NULL;

	if (last && pcb_extent_continues(last, extent)) {
		last->end = extent->end;
		queue->demand += pcb_extent_demand(extent);
		return true;
	}
	if (queue->count == PCB_QUEUE_EXTENTS)
		return false;
	queue->demand += pcb_extent_demand(extent);
	*pcb_queue_at(queue, queue->count++) = *extent;
	return true;
}

/* Adds an extent in front of all others.  Returns false when the queue is full. */
bool pcb_queue_push_front(struct pcb_queue *queue, const struct pcb_extent *extent)
{
	if (queue->count == PCB_QUEUE_EXTENTS)
		return false;
	queue->first = (queue->first + PCB_QUEUE_EXTENTS - 1) % PCB_QUEUE_EXTENTS;
	queue->count++;
	*pcb_queue_at(queue, 0) = *extent;
	queue->demand += pcb_extent_demand(extent);
	return true;
}

/*
 * Where a piece ends that begins at @start: at a multiple, so that no large folio of at most that
 * size lies across two pieces.  invalidate_mapping_pages() leaves out a folio that is not wholly in
 * its range (find_lock_entries() in mm/filemap.c), and readahead has to begin with small folios
 * where it is not aligned.
 */
pgoff_t pcb_piece_end(pgoff_t start, pgoff_t end, unsigned long multiple)
{
	return min(end, round_down(start, (pgoff_t)multiple) + multiple);
}

/*
 * Takes a piece off the front, which ends at a multiple of @read_pages or @drop_pages (powers of
 * two) or with its extent; a marker is always on its first page.  The queue is not empty.
 */
struct pcb_extent pcb_queue_pop(struct pcb_queue *queue, unsigned long read_pages,
				unsigned long drop_pages)
{
	struct pcb_extent *extent = pcb_queue_at(queue, 0);
	struct pcb_extent piece = *extent;

	piece.end = pcb_piece_end(extent->start, extent->end,
				  extent->op == PCB_OP_READ ? read_pages : drop_pages);
	if (extent->mark == extent->start)
		extent->mark =
			extent->mark_step ? extent->mark + extent->mark_step : PAGECACHE_NO_MARK;
	else
		piece.mark = PAGECACHE_NO_MARK;
	if (extent->mark > extent->start && extent->mark < piece.end)
		piece.end = extent->mark;
	extent->start = piece.end;
	queue->demand -= pcb_extent_demand(&piece);
	if (extent->start == extent->end) {
		queue->first = (queue->first + 1) % PCB_QUEUE_EXTENTS;
		queue->count--;
	}
	return piece;
}

/* Forgets everything.  Returns the pages that were to be read. */
u64 pcb_queue_clear(struct pcb_queue *queue)
{
	u64 pages = 0;
	unsigned int i;

	for (i = 0; i < queue->count; i++) {
		const struct pcb_extent *extent = pcb_queue_at(queue, i);

		if (extent->op == PCB_OP_READ)
			pages += extent->end - extent->start;
	}
	queue->count = 0;
	queue->demand = 0;
	return pages;
}
