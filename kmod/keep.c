// SPDX-License-Identifier: GPL-2.0-only
/*
 * keep.c - which pages a policy keeps, and how many it may.
 *
 * What is counted is pages that are in the cache because reclaim was told to keep them: each page
 * once, however often it is asked about.
 */
#include <linux/bitmap.h>
#include <linux/mm.h>
#include <linux/slab.h>

#include "pagecache.h"

/* 1 TiB of a file; the bits of that are 32 MiB. */
#define PCB_KEPT_MAX_PAGES (1ULL << (40 - PAGE_SHIFT))

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

/* NULL: the policy does not evict, or no memory.  The tag's pages are @pages. */
struct pcb_kept *pcb_kept_new(struct pcb_policy *p, u64 pages)
{
	struct pcb_kept *kept;

	if (!(p->hooks & BIT(PAGECACHE_HOOK_EVICT)))
		return NULL;
	pages = min(pages, PCB_KEPT_MAX_PAGES);
	kept = kvzalloc(struct_size(kept, bits, BITS_TO_LONGS(pages)), GFP_KERNEL);
	if (!kept) {
		pr_warn("policy %s cannot keep a file of %llu pages: no memory for the record\n",
			p->name, pages);
		return NULL;
	}
	kept->pages = pages;
	kept->policy = p;
	kref_get(&p->ref);
	return kept;
}

static void pcb_kept_release(struct rcu_head *rcu)
{
	struct pcb_kept *kept = container_of(rcu, struct pcb_kept, rcu);

	/* Only now: until the end of the grace period a hook may have counted. */
	atomic64_sub(atomic64_read(&kept->count), &kept->policy->kept);
	pcb_policy_put(kept->policy);
	kvfree(kept);
}

/* Nobody finds it any more. */
void pcb_kept_free(struct pcb_kept *kept)
{
	if (kept)
		call_rcu(&kept->rcu, pcb_kept_release);
}

bool pcb_kept_has(const struct pcb_kept *kept, pgoff_t index)
{
	return index < kept->pages && test_bit(index, kept->bits);
}

/*
 * Counts the pages of a folio as kept; false if the budget does not have that many left.  The
 * folio is locked, as it is when it leaves the cache: nobody else changes its bits.
 */
bool pcb_kept_add(struct pcb_kept *kept, pgoff_t index, unsigned long nr)
{
	struct pcb_policy *p = kept->policy;
	u64 bound = READ_ONCE(p->keep_max);
	unsigned long i, fresh = 0;

	if (index >= kept->pages || nr > kept->pages - index)
		return false; /* the file has grown since it was tagged */
	for (i = index; i < index + nr; i++)
		fresh += !test_bit(i, kept->bits);
	if (atomic64_add_return(fresh, &p->kept) > bound) {
		atomic64_sub(fresh, &p->kept);
		return false;
	}
	atomic64_add(fresh, &kept->count);
	for (i = index; fresh && i < index + nr; i++)
		set_bit(i, kept->bits);
	return true;
}

void pcb_kept_del(struct pcb_kept *kept, pgoff_t index, unsigned long nr)
{
	unsigned long i, end = min(index + nr, kept->pages), gone = 0;

	if (!atomic64_read(&kept->count))
		return;
	for (i = index; i < end; i++)
		gone += test_and_clear_bit(i, kept->bits);
	if (!gone)
		return;
	atomic64_sub(gone, &kept->count);
	atomic64_sub(gone, &kept->policy->kept);
}
