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

#define PCB_DRAIN_TIMEOUT (5 * HZ) /* for what is being submitted of files that are let go of */

/*
 * Streams of one file system and memory cgroup on one node.  What blocks a worker (a server that
 * does not answer, a cgroup that is throttled) blocks it for these: at most pcb_workers of the
 * node's workers are at work for one domain, and others are left for the other domains.
 */
struct pcb_domain {
	struct list_head list; /* of its node; those whose turn it is come first */
	struct list_head ready; /* streams that want a worker */
	const struct super_block *sb; /* compared only */
	const struct mem_cgroup *memcg; /* compared only: the streams hold it */
	unsigned int streams;
	unsigned int running; /* workers */
};

/* Whose request it is, of what, and where it is read. */
struct pcb_stream_key {
	struct file *file;
	struct pcb_policy *policy;
	struct mem_cgroup *memcg;
	struct mempolicy *mempolicy; /* NULL: none, or a policy names the node */
	s32 node;
};

struct pcb_stream {
	struct hlist_node hash;
	struct list_head ready; /* on its domain's list while it has extents */
	struct pcb_domain *domain;
	struct pcb_stream_key key;
	const struct vfsmount *mnt; /* compared only */
	struct cgroup_subsys_state *blkcg;
	unsigned int running; /* workers at a piece of it */
	unsigned int running_demand; /* of these: at one that a reader is waiting for */
	bool dying; /* its file is being released */
	struct pcb_queue queue;
};

extern spinlock_t pcb_lock; /* streams, domains and the lists of the nodes */
extern wait_queue_head_t pcb_progress; /* a piece was done, or a stream has gone */

/* streams.c */
int pcb_key_of_current(struct pcb_stream_key *key, struct pcb_policy *p, s32 node);
void pcb_key_put(const struct pcb_stream_key *key);
int pcb_enqueue_locked(struct pcb_stream_key *key, const struct pcb_extent *extent);
int pcb_enqueue(struct pcb_policy *p, struct file *file, s32 node, const struct pcb_extent *extent);
bool pcb_file_held(struct file *file);
bool pcb_demand_pending(struct file *file, s32 node);
bool pcb_reader_gone(struct pcb_stream *s);
u64 pcb_stream_cancel(struct pcb_stream *s);
void pcb_stream_release(struct pcb_stream *s);
s64 pcb_cancel_file(struct file *file);
void pcb_cancel_policy(struct pcb_policy *p);
void pcb_drain_mount(const struct vfsmount *mnt);

/* workers.c */
int pcb_workers_start(void);
void pcb_workers_stop(void);
bool pcb_node_known(s32 node);
struct pcb_domain *pcb_domain_get(s32 node, const struct super_block *sb,
				  const struct mem_cgroup *memcg);
void pcb_domain_put(struct pcb_domain *domain);
void pcb_stream_wake(struct pcb_stream *s);

#endif /* PCB_STREAMS_H */
