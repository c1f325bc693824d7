// SPDX-License-Identifier: GPL-2.0-only
/* plan.c - clamps a readahead answer to the file, to the module's bounds and to known nodes. */
#include <linux/minmax.h>

#include "plan.h"

enum pcb_plan_result pcb_plan_from(const struct pagecache_answer *answer,
				   const struct pcb_plan_bounds *bounds, struct pcb_plan *plan)
{
	u64 nr = answer->nr;
	bool clamped = false;

	*plan = (struct pcb_plan){
		.mark = PAGECACHE_NO_MARK,
		.order = PAGECACHE_ORDER_AUTO,
		.node = PAGECACHE_NODE_ANY,
	};
	if (!nr)
		return PCB_PLAN_AS_ANSWERED;
	if (answer->start >= bounds->file_pages)
		return PCB_PLAN_INVALID;
	nr = min(nr, bounds->file_pages - answer->start);
	nr = min(nr, bounds->max_pages);
	clamped = nr != answer->nr;
	plan->start = answer->start;
	plan->nr = nr;
	if (answer->mark != PAGECACHE_NO_MARK) {
		if (answer->mark >= answer->start && answer->mark - answer->start < nr)
			plan->mark = answer->mark;
		else
			clamped = true;
	}
	if (answer->order != PAGECACHE_ORDER_AUTO) {
		plan->order = min(answer->order, bounds->max_order);
		clamped |= plan->order != answer->order;
	}
	if (answer->node != PAGECACHE_NODE_ANY) {
		if (bounds->node_allowed)
			plan->node = answer->node;
		else
			clamped = true;
	}
	return clamped ? PCB_PLAN_CLAMPED : PCB_PLAN_AS_ANSWERED;
}
