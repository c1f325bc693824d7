/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * plan.h - a readahead answer, taken out of the policy's hands: clamped, and safe to carry out
 * without it.
 *
 * Knows pages and bounds only: tests/unit/test_kmod_pure.py compiles it for user space.
 */
#ifndef PCB_PLAN_H
#define PCB_PLAN_H

#include <linux/types.h>

#include "pagecache_abi.h"

struct pcb_plan {
	pgoff_t start;
	unsigned long nr;
	pgoff_t mark; /* or PAGECACHE_NO_MARK */
	u32 order; /* or PAGECACHE_ORDER_AUTO */
	s32 node; /* or PAGECACHE_NODE_ANY */
	bool dropbehind; /* the reader wants what is read to be dropped after use (RWF_DONTCACHE) */
};

struct pcb_plan_bounds {
	u64 file_pages;
	u64 max_pages; /* of one answer */
	u32 max_order;
	bool node_allowed; /* whether the node that the answer names can be read on, and may be */
};

enum pcb_plan_result {
	PCB_PLAN_AS_ANSWERED,
	PCB_PLAN_CLAMPED,
	PCB_PLAN_INVALID, /* the answer makes no sense: it starts behind the file's end */
};

enum pcb_plan_result pcb_plan_from(const struct pagecache_answer *answer,
				   const struct pcb_plan_bounds *bounds, struct pcb_plan *plan);

#endif /* PCB_PLAN_H */
