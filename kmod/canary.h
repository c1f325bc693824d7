/* SPDX-License-Identifier: GPL-2.0-only */
/* canary.h - do the hooks that were attached really run? */
#ifndef PCB_CANARY_H
#define PCB_CANARY_H

#include <linux/types.h>

int pcb_canary_prepare(void);
void pcb_canary_release(void);
int pcb_canary_try(u32 hooks, const char **failed);

#endif /* PCB_CANARY_H */
