/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * streams.h - what is queued for one reader and NUMA node.
 *
 * A stream holds one reference to the reader's file and to the cgroups to charge, and is gone with
 * its last extent.  It never keeps a file alive for its own sake: when its reference is the only
 * one left (the reader has closed the file and unmapped it), or the file has been deleted, the rest
 * of it is cancelled.
 */
#ifndef PCB_STREAMS_H
#define PCB_STREAMS_H

#include <linux/list.h>
#include <linux/spinlock.h>
#include <linux/wait.h>

#include "extents.h"
#include "policy.h"

struct pcb_stream {
	struct hlist_node hash;
	struct list_head ready; /* on its node's list while it has extents */
	struct file *file;
	struct super_block *sb; /* compared only */
	struct pcb_policy *policy;
	struct mem_cgroup *memcg;
	struct cgroup_subsys_state *blkcg;
	s32 node;
	unsigned int running; /* workers at a piece of it */
	bool dying; /* its file is being released */
	struct pcb_queue queue;
};

struct pcb_node {
	struct list_head ready;
	wait_queue_head_t wait;
	unsigned int workers;
	struct task_struct **threads;
};

extern spinlock_t pcb_lock; /* streams and the lists of the nodes */
extern struct pcb_node *pcb_nodes[MAX_NUMNODES];
extern wait_queue_head_t pcb_progress; /* a piece was done, or a stream has gone */

/* streams.c */
int pcb_enqueue(struct pcb_policy *p, struct file *file, s32 node, const struct pcb_extent *extent);
bool pcb_stream_submitted(struct file *file, s32 node);
bool pcb_reader_gone(struct pcb_stream *s);
u64 pcb_stream_cancel(struct pcb_stream *s);
void pcb_stream_release(struct pcb_stream *s);
s64 pcb_cancel_file(struct file *file);
void pcb_cancel_policy(struct pcb_policy *p);
void pcb_drain_sb(struct super_block *sb);
void pcb_drain_all(void);

/* workers.c */
int pcb_workers_start(void);
void pcb_workers_stop(void);
bool pcb_node_known(s32 node);
void pcb_node_wake(s32 node, struct pcb_stream *s);

#endif /* PCB_STREAMS_H */
