/* SPDX-License-Identifier: GPL-2.0-only */
/* control.h - the control device. */
#ifndef PCB_CONTROL_H
#define PCB_CONTROL_H

int pcb_control_init(void);
void pcb_control_exit(void);

#endif /* PCB_CONTROL_H */
