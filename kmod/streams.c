// SPDX-License-Identifier: GPL-2.0-only
/* streams.c - queues of extents, one for each reader and node, and what makes them go. */
#include <linux/blk-cgroup.h>
#include <linux/cgroup.h>
#include <linux/file.h>
#include <linux/hashtable.h>
#include <linux/memcontrol.h>
#include <linux/module.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>

#include "placement.h"
#include "streams.h"

DEFINE_SPINLOCK(pcb_lock);
static DEFINE_HASHTABLE(pcb_streams, 8);
DECLARE_WAIT_QUEUE_HEAD(pcb_progress);

/* Counts the references to a file that streams hold. */
static long pcb_stream_refs(const struct file *file)
{
	struct pcb_stream *s;
	long refs = 0;

	lockdep_assert_held(&pcb_lock);
	hash_for_each_possible (pcb_streams, s, hash, (unsigned long)file)
		refs += s->key.file == file && !s->dying;
	return refs;
}

static struct pcb_stream *pcb_stream_find(const struct pcb_stream_key *key)
{
	struct pcb_stream *s;

	lockdep_assert_held(&pcb_lock);
	hash_for_each_possible (pcb_streams, s, hash, (unsigned long)key->file) {
		if (s->key.file == key->file && s->key.policy == key->policy &&
		    s->key.memcg == key->memcg && s->key.mempolicy == key->mempolicy &&
		    s->key.node == key->node && !s->dying)
			return s;
	}
	return NULL;
}

/* Takes over the key's references to its cgroup and memory policy. */
static struct pcb_stream *pcb_stream_new(const struct pcb_stream_key *key)
{
	const struct super_block *sb = file_inode(key->file)->i_sb;
	struct pcb_stream *s;

	lockdep_assert_held(&pcb_lock);
	/* Hooks cannot sleep. */
	s = kzalloc(sizeof(*s), GFP_NOWAIT | __GFP_NOWARN);
	if (!s)
		return NULL;
	s->key = *key;
	/* Unloading then fails with "in use" instead of waiting for a file system that hangs. */
	if (!try_module_get(THIS_MODULE)) {
		kfree(s);
		return NULL;
	}
	s->domain = pcb_domain_get(s->key.node, sb, s->key.memcg);
	if (!s->domain) {
		module_put(THIS_MODULE);
		kfree(s);
		return NULL;
	}
	INIT_LIST_HEAD(&s->ready);
	get_file(s->key.file);
	s->mnt = s->key.file->f_path.mnt;
	kref_get(&s->key.policy->ref);
#ifdef CONFIG_BLK_CGROUP
	s->blkcg = task_get_css(current, io_cgrp_id);
#endif
	hash_add(pcb_streams, &s->hash, (unsigned long)s->key.file);
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
	__fput_sync(s->key.file);
	mem_cgroup_put(s->key.memcg);
	pcb_mempolicy_put(s->key.mempolicy);
	if (s->blkcg)
		css_put(s->blkcg);
	pcb_policy_put(s->key.policy);
	spin_lock(&pcb_lock);
	hash_del(&s->hash);
	pcb_domain_put(s->domain);
	kfree(s);
	wake_up_all(&pcb_progress);
	module_put(THIS_MODULE);
}

/* Forgets what is queued.  Returns pages. */
u64 pcb_stream_cancel(struct pcb_stream *s)
{
	u64 pages;

	lockdep_assert_held(&pcb_lock);
	pages = pcb_queue_clear(&s->queue);
	atomic64_sub(pages, &s->key.policy->inflight);
	pcb_count(s->key.policy, prefetch_cancelled_bytes, pages << PAGE_SHIFT);
	return pages;
}

/* Takes over the key's references if that leads to a new stream: they are NULL then. */
int pcb_enqueue_locked(struct pcb_stream_key *key, const struct pcb_extent *extent)
{
	struct pcb_stream *s;
	bool queued;

	lockdep_assert_held(&pcb_lock);
	s = pcb_stream_find(key);
	if (!s) {
		s = pcb_stream_new(key);
		if (!s)
			return -ENOMEM;
		key->memcg = NULL;
		key->mempolicy = NULL;
	}
	queued = extent->demand ? pcb_queue_push_front(&s->queue, extent)
				: pcb_queue_push(&s->queue, extent);
	if (!queued)
		return -ENOSPC;
	if (extent->op == PCB_OP_READ)
		atomic64_add(extent->end - extent->start, &s->key.policy->inflight);
	pcb_stream_wake(s);
	/* Before the other streams of its domain, too: what is read ahead of other files can wait.
	 */
	if (extent->demand)
		list_move(&s->ready, &s->domain->ready);
	return 0;
}

/*
 * Who asks: the current task; which file is for the caller to fill in.  @node as placement.c allows
 * it, or PAGECACHE_NODE_ANY.  Returns 0, or -EINVAL: no node may be read on.
 */
int pcb_key_of_current(struct pcb_stream_key *key, struct pcb_policy *p, s32 node)
{
	*key = (struct pcb_stream_key){ .policy = p, .node = node };
	if (node == PAGECACHE_NODE_ANY) {
		key->node = pcb_node_of_current();
		if (key->node < 0)
			return -EINVAL;
		key->mempolicy = pcb_mempolicy_of_current();
	}
	key->memcg = get_mem_cgroup_from_mm(current->mm);
	return 0;
}

void pcb_key_put(const struct pcb_stream_key *key)
{
	mem_cgroup_put(key->memcg);
	pcb_mempolicy_put(key->mempolicy);
}

/*
 * Queues an extent for the current task; @node as above.  Returns 0, -EINVAL (no node may be read
 * on), -ENOSPC (the queue is full), -ENOMEM.
 */
int pcb_enqueue(struct pcb_policy *p, struct file *file, s32 node, const struct pcb_extent *extent)
{
	struct pcb_stream_key key;
	int err = pcb_key_of_current(&key, p, node);

	if (err)
		return err;
	key.file = file;
	spin_lock(&pcb_lock);
	err = pcb_enqueue_locked(&key, extent);
	spin_unlock(&pcb_lock);
	pcb_key_put(&key);
	return err;
}

/* The reader has closed and unmapped the file, or the file has been deleted. */
bool pcb_reader_gone(struct pcb_stream *s)
{
	lockdep_assert_held(&pcb_lock);
	return file_count(s->key.file) <= pcb_stream_refs(s->key.file) ||
	       !file_inode(s->key.file)->i_nlink;
}

/* Whether there is something of @file that a reader waits for, and that @node has not submitted. */
bool pcb_demand_pending(struct file *file, s32 node)
{
	struct pcb_stream *s;
	bool pending = false;

	spin_lock(&pcb_lock);
	hash_for_each_possible (pcb_streams, s, hash, (unsigned long)file) {
		if (s->key.file == file && s->key.node == node && !s->dying)
			pending |= s->queue.demand || s->running_demand;
	}
	spin_unlock(&pcb_lock);
	return pending;
}

s64 pcb_cancel_file(struct file *file)
{
	struct pcb_stream *s;
	s64 pages = 0;

	spin_lock(&pcb_lock);
	hash_for_each_possible (pcb_streams, s, hash, (unsigned long)file) {
		if (s->key.file == file && !s->dying)
			pages += pcb_stream_cancel(s);
	}
	spin_unlock(&pcb_lock);
	wake_up_all(&pcb_progress);
	return pages;
}

/* Cancels what is queued of a file; true while a stream still holds it. */
bool pcb_file_held(struct file *file)
{
	struct pcb_stream *s;
	bool held = false;

	spin_lock(&pcb_lock);
	hash_for_each_possible (pcb_streams, s, hash, (unsigned long)file) {
		if (s->key.file != file)
			continue;
		held = true;
		if (!s->dying)
			pcb_stream_cancel(s);
	}
	spin_unlock(&pcb_lock);
	return held;
}

void pcb_cancel_policy(struct pcb_policy *p)
{
	struct pcb_stream *s;
	int bucket;

	spin_lock(&pcb_lock);
	hash_for_each (pcb_streams, bucket, s, hash) {
		if (s->key.policy == p && !s->dying)
			pcb_stream_cancel(s);
	}
	spin_unlock(&pcb_lock);
	wake_up_all(&pcb_progress);
}

/* Cancels what is queued of files of @mnt; true while one of them is still held. */
static bool pcb_mount_busy(const struct vfsmount *mnt)
{
	struct pcb_stream *s;
	bool busy = false;
	int bucket;

	spin_lock(&pcb_lock);
	hash_for_each (pcb_streams, bucket, s, hash) {
		if (s->mnt != mnt)
			continue;
		busy = true;
		if (!s->dying)
			pcb_stream_cancel(s);
	}
	spin_unlock(&pcb_lock);
	return busy;
}

/* Lets go of the files of a mount that is about to be unmounted. */
void pcb_drain_mount(const struct vfsmount *mnt)
{
	wait_event_timeout(pcb_progress, !pcb_mount_busy(mnt), PCB_DRAIN_TIMEOUT);
}
