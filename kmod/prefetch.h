/* SPDX-License-Identifier: GPL-2.0-only */
/* prefetch.h - streams, shared by their queue (prefetch.c) and the workers (workers.c). */
#ifndef PCB_PREFETCH_H
#define PCB_PREFETCH_H

#include <linux/hashtable.h>
#include <linux/wait.h>

#include "pagecache.h"

#define PCB_STREAM_EXTENTS 64

enum pcb_op { PCB_OP_READ, PCB_OP_DROP };

struct pcb_extent {
	pgoff_t start;
	pgoff_t end;
	pgoff_t mark; /* next page to get a marker, or PAGECACHE_NO_MARK */
	u32 mark_step;
	u32 order;
	enum pcb_op op;
};

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
	unsigned int first, count;
	bool dying; /* its file is being released */
	struct pcb_extent extents[PCB_STREAM_EXTENTS];
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

/* prefetch.c, all under pcb_lock but the last */
struct pcb_extent pcb_stream_pop(struct pcb_stream *s);
u64 pcb_stream_cancel(struct pcb_stream *s);
bool pcb_reader_gone(struct pcb_stream *s);
bool pcb_sb_busy(const struct super_block *sb);
void pcb_stream_release(struct pcb_stream *s);

#endif /* PCB_PREFETCH_H */
