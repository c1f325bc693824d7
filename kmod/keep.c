// SPDX-License-Identifier: GPL-2.0-only
/*
 * keep.c - how much of what reclaim wants a policy may keep.
 *
 * What is counted is pages that are in the cache because reclaim was told to keep them
 * (keep_map.c).
 */
#include <linux/mm.h>
#include <linux/slab.h>

#include "tags.h"

/* 1 TiB of a file; the bits of that are 32 MiB. */
#define PCB_KEEP_MAX_PAGES (1ULL << (40 - PAGE_SHIFT))

u64 pcb_max_keep_pages(void)
{
	return div_u64((u64)totalram_pages() * pcb_max_keep_percent, 100);
}

u64 pcb_keep_budget(struct pcb_policy *p, u64 pages)
{
	pages = min(pages, pcb_max_keep_pages());
	WRITE_ONCE(p->keep_max, pages);
	return pages;
}

/* NULL: a policy with these hooks does not evict, or no memory.  The tag's pages are @pages. */
struct pcb_keep *pcb_keep_new(struct pcb_policy *p, u32 hooks, u64 pages)
{
	struct pcb_keep *keep;

	if (!(hooks & BIT(PAGECACHE_HOOK_EVICT)))
		return NULL;
	pages = min(pages, PCB_KEEP_MAX_PAGES);
	keep = kvzalloc(struct_size(keep, map.bits, BITS_TO_LONGS(pages)), GFP_KERNEL);
	if (!keep) {
		pr_warn("policy %s cannot keep a file of %llu pages: no memory for the record\n",
			p->name, pages);
		return NULL;
	}
	keep->map.pages = pages;
	keep->policy = p;
	kref_get(&p->ref);
	return keep;
}

static void pcb_keep_release(struct rcu_head *rcu)
{
	struct pcb_keep *keep = container_of(rcu, struct pcb_keep, rcu);

	/* Only now: until the end of the grace period a hook may have counted. */
	pcb_keep_map_clear(&keep->map, &keep->policy->kept);
	pcb_policy_put(keep->policy);
	kvfree(keep);
}

/* Frees a record that no hook can find any more. */
void pcb_keep_free(struct pcb_keep *keep)
{
	if (keep)
		call_rcu(&keep->rcu, pcb_keep_release);
}

/* Counts the pages of a locked folio as kept; false if the budget does not have that many left. */
bool pcb_keep_add(struct pcb_keep *keep, pgoff_t index, unsigned long nr)
{
	struct pcb_policy *p = keep->policy;

	return pcb_keep_map_add(&keep->map, index, nr, &p->kept, READ_ONCE(p->keep_max));
}

void pcb_keep_del(struct pcb_keep *keep, pgoff_t index, unsigned long nr)
{
	pcb_keep_map_del(&keep->map, index, nr, &keep->policy->kept);
}
