// SPDX-License-Identifier: GPL-2.0-only
/* drop.c - drops pages from the page cache, and says how many went. */
#include <linux/pagemap.h>

#include "extents.h"
#include "prefetch.h"

static u64 pcb_drop_piece(struct address_space *mapping, pgoff_t start, pgoff_t end)
{
	u64 before = READ_ONCE(mapping->nrpages);
	/* The function's own count has the marks that evicted pages left behind in it. */
	u64 count = invalidate_mapping_pages(mapping, start, end - 1);
	u64 after = READ_ONCE(mapping->nrpages);

	return before > after ? min(count, before - after) : 0;
}

/* Drops what is clean and not mapped of [start, end).  Returns pages. */
u64 pcb_drop_now(struct address_space *mapping, pgoff_t start, pgoff_t end)
{
	u64 pages = 0;

	while (start < end) {
		pgoff_t piece_end = pcb_piece_end(start, end, PCB_DROP_PAGES);

		pages += pcb_drop_piece(mapping, start, piece_end);
		start = piece_end;
		cond_resched();
	}
	return pages;
}
