/* SPDX-License-Identifier: GPL-2.0-only */
/* call.h - one call of a hook. */
#ifndef PCB_CALL_H
#define PCB_CALL_H

#include "tags.h"

/* What a pressure hook wants dropped of one file. */
struct pcb_drops {
	unsigned int nr;
	struct {
		pgoff_t start;
		pgoff_t end;
	} at[64];
};

/*
 * The policy sees @ctx only; kfuncs find the rest from it, so that a policy cannot name a file
 * other than the one it is asked about.
 */
struct pcb_call {
	struct pagecache_ctx ctx;
	struct file *file; /* NULL where the hook has none */
	struct pcb_policy *policy;
	struct pcb_drops *drops; /* where pressure's drops go */
	enum pagecache_hook hook;
};

void pcb_call_init(struct pcb_call *call, const struct pcb_governance *by, enum pagecache_hook hook,
		   struct address_space *mapping, struct file *file, pgoff_t index,
		   unsigned long nr);

#endif /* PCB_CALL_H */
