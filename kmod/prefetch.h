/* SPDX-License-Identifier: GPL-2.0-only */
/* prefetch.h - reading and dropping for policies. */
#ifndef PCB_PREFETCH_H
#define PCB_PREFETCH_H

#include "call.h"
#include "compat.h"
#include "plan.h"

/* prefetch.c: what the kfuncs do */
s64 pcb_prefetch_queue(struct pcb_call *call, pgoff_t start, u64 nr, s32 node, u32 mark_step);
s64 pcb_drop_queue(struct pcb_call *call, pgoff_t start, u64 nr);
s64 pcb_prefetch_file(struct pcb_call *call, const struct pagecache_file_extent *wish);
s64 pcb_drop_file(struct pcb_call *call, const struct pagecache_file_extent *wish);
s64 pcb_next_file(struct pcb_call *call, struct pagecache_file_key *next);

/* read.c: submits reads */
void pcb_read_here(struct file *file, struct address_space *mapping, const struct pcb_plan *plan);
bool pcb_read_on_node(struct pcb_policy *p, struct file *file, const struct pcb_plan *plan);
void pcb_read_later(struct pcb_policy *p, struct file *file, const struct pcb_plan *plan);
int pcb_read_prepare(void);
void pcb_ra_order_original(PCB_RA_ORDER_ARGS);

/* drop.c */
u64 pcb_drop_now(struct address_space *mapping, pgoff_t start, pgoff_t end);

#endif /* PCB_PREFETCH_H */
