/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * sessions.h - files that a process lends for as long as it has the control device open.
 *
 * A policy is asked about the file that a reader has open, and streams hold that file only.  What
 * is read next may be another file of the model: with nobody's hand on it there is nothing to read
 * it through.  So whoever begins a load lends the model's files, in the order in which they are
 * read, and takes them back when it is over.
 *
 * A session has an open file of its own for each, opened with the rights of the descriptor that was
 * lent: the lender can close its own, and nobody else reads through it.
 */
#ifndef PCB_SESSIONS_H
#define PCB_SESSIONS_H

#include <linux/fs.h>

#include "call.h"

struct pcb_session;

struct pcb_session *pcb_session_new(void);
void pcb_session_end(struct pcb_session *session);
int pcb_session_lend(struct pcb_session *session, struct file *file);
int pcb_session_take_back(struct pcb_session *session, struct file *file);
u32 pcb_lent_count(void);
u32 pcb_lent_times(const struct inode *inode);

/* For kfuncs; with pcb_lock held. */
struct file *pcb_lent_file(const struct pcb_policy *p, const struct pagecache_file_key *key);
struct file *pcb_lent_next(const struct pcb_call *call);

#endif /* PCB_SESSIONS_H */
