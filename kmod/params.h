/* SPDX-License-Identifier: GPL-2.0-only */
/* params.h - parameters of the module (main.c) and sizes that follow from the page size. */
#ifndef PCB_PARAMS_H
#define PCB_PARAMS_H

#undef pr_fmt /* printk.h may have come first */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/sizes.h>

/* Bounds that no policy can exceed. */
extern unsigned int pcb_max_answer_mib;
extern unsigned int pcb_max_extent_mib;
extern unsigned int pcb_max_inflight_mib;
extern unsigned int pcb_workers;
extern unsigned int pcb_max_invalid;
extern unsigned int pcb_max_keep_percent;
extern unsigned int pcb_max_evict_us;
extern unsigned int pcb_max_lent;

static inline unsigned long pcb_mib_to_pages(unsigned int mib)
{
	return (unsigned long)mib << (20 - PAGE_SHIFT);
}

/* One submission to the file system: what force_page_cache_ra() uses, too. */
#define PCB_CHUNK_PAGES ((unsigned long)SZ_2M >> PAGE_SHIFT)

/* Of a folio that is read ahead, where the file system takes large ones. */
#define PCB_FOLIO_PAGES max((unsigned long)SZ_256K >> PAGE_SHIFT, 4UL)

/* What is dropped at once: no folio of the page cache is larger. */
#define PCB_DROP_PAGES max(PCB_CHUNK_PAGES, 1UL << MAX_PAGECACHE_ORDER)

#endif /* PCB_PARAMS_H */
