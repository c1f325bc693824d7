// SPDX-License-Identifier: GPL-2.0-only
/*
 * harness - the parts of the module that know pages and bounds only, as a library for
 * tests/unit/test_kmod_pure.py.  The headers in linux/ stand in for the kernel's.
 */
#include <stdlib.h>

#include "../../../kmod/extents.c"
#include "../../../kmod/keep_map.c"
#include "../../../kmod/plan.c"

struct keep_maps {
	atomic64_t total;
	struct pcb_keep_map *map[2];
};

struct keep_maps *keep_new(unsigned long pages)
{
	struct keep_maps *maps = calloc(1, sizeof(*maps));

	for (int i = 0; i < 2; i++) {
		maps->map[i] = calloc(1, sizeof(*maps->map[i]) + pages / 8 + sizeof(long));
		maps->map[i]->pages = pages;
	}
	return maps;
}

bool keep_has(struct keep_maps *maps, int map, unsigned long index)
{
	return pcb_keep_map_has(maps->map[map], index);
}

bool keep_add(struct keep_maps *maps, int map, unsigned long index, unsigned long nr, u64 bound)
{
	return pcb_keep_map_add(maps->map[map], index, nr, &maps->total, bound);
}

void keep_del(struct keep_maps *maps, int map, unsigned long index, unsigned long nr)
{
	pcb_keep_map_del(maps->map[map], index, nr, &maps->total);
}

u64 keep_clear(struct keep_maps *maps, int map)
{
	return pcb_keep_map_clear(maps->map[map], &maps->total);
}

s64 keep_total(struct keep_maps *maps)
{
	return atomic64_read(&maps->total);
}

void keep_free(struct keep_maps *maps)
{
	free(maps->map[0]);
	free(maps->map[1]);
	free(maps);
}

struct pcb_queue *queue_new(void)
{
	return calloc(1, sizeof(struct pcb_queue));
}

unsigned int queue_count(struct pcb_queue *queue)
{
	return queue->count;
}
