/* SPDX-License-Identifier: GPL-2.0-only */
/* hooks_pressure.h - what the pressure hook wants to know of pages that come into the cache. */
#ifndef PCB_HOOKS_PRESSURE_H
#define PCB_HOOKS_PRESSURE_H

#include <linux/workqueue.h>

#include "tags.h"

/* hooks_pressure.c: who notices that memory is short */
struct pcb_shortage {
	u64 cgroup_id; /* 0: the machine */
	u64 pages; /* 0: unused */
};

extern bool pcb_pressure_live; /* inodes of tagged files are known */
bool pcb_take_shortage(struct pcb_shortage *out);
void pcb_pressure_added(struct pcb_tag *tag, struct folio *folio);
void pcb_note_charge(struct pcb_tag *tag, struct folio *folio);

/* pressure.c: what is done about it */
extern struct delayed_work pcb_pressure_item;
extern unsigned long pcb_pressure_pause; /* jiffies between questions that got nothing */
bool pcb_asked_for_pressure(const struct pcb_policy *p);

#endif /* PCB_HOOKS_PRESSURE_H */
