/* SPDX-License-Identifier: GPL-2.0-only */
/* fairness.h - whether reclaim can afford to keep what a policy wants kept. */
#ifndef PCB_FAIRNESS_H
#define PCB_FAIRNESS_H

#include <linux/memcontrol.h>
#include <linux/mm_types.h>

struct pcb_reclaimer;

int pcb_fairness_prepare(void);
int pcb_fairness_on(void);
void pcb_fairness_off(void);
struct pcb_reclaimer *pcb_reclaimer_of_current(struct folio *folio, struct mem_cgroup *memcg);
int pcb_reclaim_priority(const struct pcb_reclaimer *reclaimer);
bool pcb_reclaim_affords(struct pcb_reclaimer *reclaimer, struct folio *folio,
			 struct mem_cgroup *memcg);
void pcb_reclaim_kept(struct pcb_reclaimer *reclaimer, unsigned long nr);

#endif /* PCB_FAIRNESS_H */
