// SPDX-License-Identifier: GPL-2.0-only
/* streams.c - queues of extents, one for each reader and node, and what makes them go. */
#include <linux/blk-cgroup.h>
#include <linux/cgroup.h>
#include <linux/file.h>
#include <linux/hashtable.h>
#include <linux/memcontrol.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "streams.h"

#define PCB_DRAIN_TIMEOUT (5 * HZ)

DEFINE_SPINLOCK(pcb_lock);
static DEFINE_HASHTABLE(pcb_streams, 8);
DECLARE_WAIT_QUEUE_HEAD(pcb_progress);

static struct pcb_stream *pcb_stream_find(const struct file *file, s32 node)
{
	struct pcb_stream *s;

	lockdep_assert_held(&pcb_lock);
	hash_for_each_possible (pcb_streams, s, hash, (unsigned long)file) {
		if (s->file == file && s->node == node && !s->dying)
			return s;
	}
	return NULL;
}

/* References to the file that are ours. */
static long pcb_stream_refs(const struct file *file)
{
	struct pcb_stream *s;
	long refs = 0;

	lockdep_assert_held(&pcb_lock);
	hash_for_each_possible (pcb_streams, s, hash, (unsigned long)file)
		refs += s->file == file && !s->dying;
	return refs;
}

static struct pcb_stream *pcb_stream_new(struct file *file, struct pcb_policy *p, s32 node)
{
	/* Hooks cannot sleep. */
	struct pcb_stream *s = kzalloc(sizeof(*s), GFP_NOWAIT | __GFP_NOWARN);

	lockdep_assert_held(&pcb_lock);
	if (!s)
		return NULL;
	INIT_LIST_HEAD(&s->ready);
	s->file = get_file(file);
	s->sb = file_inode(file)->i_sb;
	s->node = node;
	s->policy = p;
	kref_get(&p->ref);
	s->memcg = get_mem_cgroup_from_mm(current->mm);
#ifdef CONFIG_BLK_CGROUP
	s->blkcg = task_get_css(current, io_cgrp_id);
#endif
	hash_add(pcb_streams, &s->hash, (unsigned long)file);
	return s;
}

/*
 * Releases all that a stream holds, and the stream.  In a worker, with pcb_lock held, which it lets
 * go of since that may sleep.
 */
void pcb_stream_release(struct pcb_stream *s)
{
	lockdep_assert_held(&pcb_lock);
	s->dying = true;
	list_del_init(&s->ready);
	spin_unlock(&pcb_lock);
	/* At once, not through the delayed list: an unmount may be waiting. */
	__fput_sync(s->file);
	mem_cgroup_put(s->memcg);
	if (s->blkcg)
		css_put(s->blkcg);
	pcb_policy_put(s->policy);
	spin_lock(&pcb_lock);
	hash_del(&s->hash);
	kfree(s);
	wake_up_all(&pcb_progress);
}

/* Forgets what is queued.  Returns pages. */
u64 pcb_stream_cancel(struct pcb_stream *s)
{
	u64 pages = pcb_queue_clear(&s->queue);

	lockdep_assert_held(&pcb_lock);
	atomic64_sub(pages, &s->policy->inflight);
	pcb_count(s->policy, prefetch_cancelled_bytes, pages << PAGE_SHIFT);
	return pages;
}

int pcb_enqueue(struct pcb_policy *p, struct file *file, s32 node, const struct pcb_extent *extent)
{
	struct pcb_stream *s;
	int err = 0;

	spin_lock(&pcb_lock);
	s = pcb_stream_find(file, node) ?: pcb_stream_new(file, p, node);
	if (!s) {
		err = -ENOMEM;
	} else if (!pcb_queue_push(&s->queue, extent)) {
		err = -ENOSPC;
	} else {
		if (extent->op == PCB_OP_READ)
			atomic64_add(extent->end - extent->start, &s->policy->inflight);
		pcb_node_wake(node, s);
	}
	spin_unlock(&pcb_lock);
	return err;
}

/* The reader has closed and unmapped the file, or the file has been deleted. */
bool pcb_reader_gone(struct pcb_stream *s)
{
	return file_count(s->file) <= pcb_stream_refs(s->file) || !file_inode(s->file)->i_nlink;
}

/* True when @file has nothing queued on @node. */
bool pcb_stream_submitted(struct file *file, s32 node)
{
	struct pcb_stream *s;
	bool done;

	spin_lock(&pcb_lock);
	s = pcb_stream_find(file, node);
	done = !s || (!s->queue.count && !s->running);
	spin_unlock(&pcb_lock);
	return done;
}

s64 pcb_cancel_file(struct file *file)
{
	struct pcb_stream *s;
	s64 pages = 0;

	spin_lock(&pcb_lock);
	hash_for_each_possible (pcb_streams, s, hash, (unsigned long)file) {
		if (s->file == file && !s->dying)
			pages += pcb_stream_cancel(s);
	}
	spin_unlock(&pcb_lock);
	return pages;
}

void pcb_cancel_policy(struct pcb_policy *p)
{
	struct pcb_stream *s;
	int bucket;

	spin_lock(&pcb_lock);
	hash_for_each (pcb_streams, bucket, s, hash) {
		if (s->policy == p && !s->dying)
			pcb_stream_cancel(s);
	}
	spin_unlock(&pcb_lock);
}

/* Cancels on @sb (NULL: everywhere); true while one of its files is still held. */
static bool pcb_sb_busy(const struct super_block *sb)
{
	struct pcb_stream *s;
	bool busy = false;
	int bucket;

	spin_lock(&pcb_lock);
	hash_for_each (pcb_streams, bucket, s, hash) {
		if (sb && s->sb != sb)
			continue;
		busy = true;
		if (!s->dying)
			pcb_stream_cancel(s);
	}
	spin_unlock(&pcb_lock);
	return busy;
}

/* Lets go of the files of a file system that is about to be unmounted. */
void pcb_drain_sb(struct super_block *sb)
{
	wait_event_timeout(pcb_progress, !pcb_sb_busy(sb), PCB_DRAIN_TIMEOUT);
}

/* No policy is attached and no hook runs: nothing new comes in. */
void pcb_drain_all(void)
{
	wait_event(pcb_progress, !pcb_sb_busy(NULL));
}
