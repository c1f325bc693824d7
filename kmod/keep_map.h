/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * keep_map.h - which pages of a file are kept: a bit each, set when a keep is honored, cleared when
 * the page leaves the cache or the policy changes its mind.
 *
 * Knows pages and counts only: tests/unit/test_kmod_pure.py compiles it for user space.
 */
#ifndef PCB_KEEP_MAP_H
#define PCB_KEEP_MAP_H

#include <linux/atomic.h>
#include <linux/types.h>

struct pcb_keep_map {
	atomic64_t count; /* bits set */
	unsigned long pages;
	unsigned long bits[];
};

bool pcb_keep_map_has(const struct pcb_keep_map *map, pgoff_t index);
bool pcb_keep_map_add(struct pcb_keep_map *map, pgoff_t index, unsigned long nr, atomic64_t *total,
		      u64 bound);
void pcb_keep_map_del(struct pcb_keep_map *map, pgoff_t index, unsigned long nr, atomic64_t *total);
u64 pcb_keep_map_clear(struct pcb_keep_map *map, atomic64_t *total);

#endif /* PCB_KEEP_MAP_H */
