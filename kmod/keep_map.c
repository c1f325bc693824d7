// SPDX-License-Identifier: GPL-2.0-only
/*
 * keep_map.c - which pages of a file are kept, and the total of all files of a policy.
 *
 * Each page counts once, however often it is added.  Callers hold the folio's lock, or the lock of
 * the page cache while the folio leaves it: no two of them change the bits of one page at a time.
 */
#include <linux/bitops.h>
#include <linux/minmax.h>

#include "keep_map.h"

bool pcb_keep_map_has(const struct pcb_keep_map *map, pgoff_t index)
{
	return index < map->pages && test_bit(index, map->bits);
}

/* Adds the pages of a folio; false, and nothing is changed, if @bound leaves no room for them. */
bool pcb_keep_map_add(struct pcb_keep_map *map, pgoff_t index, unsigned long nr, atomic64_t *total,
		      u64 bound)
{
	unsigned long i, fresh = 0;

	if (index >= map->pages || nr > map->pages - index)
		return false; /* the file has grown since it was tagged */
	for (i = index; i < index + nr; i++)
		fresh += !test_bit(i, map->bits);
	if ((u64)atomic64_add_return(fresh, total) > bound) {
		atomic64_sub(fresh, total);
		return false;
	}
	atomic64_add(fresh, &map->count);
	for (i = index; fresh && i < index + nr; i++)
		set_bit(i, map->bits);
	return true;
}

/* Takes pages out; what lies behind the end of the map is none of it. */
void pcb_keep_map_del(struct pcb_keep_map *map, pgoff_t index, unsigned long nr, atomic64_t *total)
{
	unsigned long i, end, gone = 0;

	if (!atomic64_read(&map->count) || index >= map->pages)
		return;
	end = index + min(nr, map->pages - index);
	for (i = index; i < end; i++)
		gone += test_and_clear_bit(i, map->bits);
	if (!gone)
		return;
	atomic64_sub(gone, &map->count);
	atomic64_sub(gone, total);
}

/* The map is about to be freed: what it has counted is given back.  Returns pages. */
u64 pcb_keep_map_clear(struct pcb_keep_map *map, atomic64_t *total)
{
	u64 pages = atomic64_xchg(&map->count, 0);

	atomic64_sub(pages, total);
	return pages;
}
