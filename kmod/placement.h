/* SPDX-License-Identifier: GPL-2.0-only */
/* placement.h - on which NUMA node a worker reads for the current task. */
#ifndef PCB_PLACEMENT_H
#define PCB_PLACEMENT_H

#include <linux/types.h>

struct mempolicy;

void pcb_placement_prepare(void);
bool pcb_node_allowed(s32 node);
s32 pcb_node_of_current(void);
struct mempolicy *pcb_mempolicy_of_current(void);
void pcb_mempolicy_put(struct mempolicy *policy);
struct mempolicy *pcb_mempolicy_set(struct mempolicy *policy);

#endif /* PCB_PLACEMENT_H */
