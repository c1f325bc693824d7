/* SPDX-License-Identifier: GPL-2.0-only */
/* hooks_evict.h - how the two ways into the evict hook, ftrace and direct.c, decide and arrive. */
#ifndef PCB_HOOKS_EVICT_H
#define PCB_HOOKS_EVICT_H

#include <linux/mm.h>

#include "compat.h"
#include "tags.h"

/* What reclaim hands on as is_locked, and what we do when we ask ourselves. */
#define PCB_LOCKED_RECLAIM 1
#define PCB_LOCKED_OURS 2

/* Whether it is reclaim that asks, and about a folio of a file that may be tagged. */
static __always_inline bool pcb_reclaim_asks(const struct folio *folio, int is_locked)
{
	const struct address_space *mapping = READ_ONCE(folio->mapping);

	/* The low bits: anonymous memory. */
	return is_locked == PCB_LOCKED_RECLAIM && mapping && !((unsigned long)mapping & 3) &&
	       mapping->host && pcb_tag_possible(mapping->host);
}

void pcb_evict_try(struct folio *folio);
int pcb_folio_referenced(struct folio *folio, int is_locked, struct mem_cgroup *target,
			 pcb_vma_flags *vm_flags);

#endif /* PCB_HOOKS_EVICT_H */
