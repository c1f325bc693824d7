// SPDX-License-Identifier: GPL-2.0-only
/*
 * prefetch.c - what is to be read and dropped on behalf of a reader, asynchronously.
 *
 * What is queued for one open file and node is a stream: it holds one reference to the
 * reader's file and to the cgroups to charge, and is gone with its last extent.  A stream
 * never keeps a file alive for its own sake: when its reference is the only one left (the
 * reader has closed the file and unmapped it), or the file has been deleted, the rest of it
 * is cancelled.
 */
#include <linux/blk-cgroup.h>
#include <linux/cgroup.h>
#include <linux/file.h>
#include <linux/memcontrol.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/topology.h>

#include "prefetch.h"

#define PCB_MIN_MARK_STEP 16 /* pages: a marker costs a call of the policy */
#define PCB_DRAIN_TIMEOUT (5 * HZ)
#define PCB_SUBMIT_TIMEOUT (HZ / 4)

DEFINE_SPINLOCK(pcb_lock);
static DEFINE_HASHTABLE(pcb_streams, 8);
DECLARE_WAIT_QUEUE_HEAD(pcb_progress);

bool pcb_node_known(s32 node)
{
	return node >= 0 && node < MAX_NUMNODES && pcb_nodes[node];
}

static struct pcb_stream *pcb_stream_find(const struct file *file, s32 node)
{
	struct pcb_stream *s;

	hash_for_each_possible (pcb_streams, s, hash, (unsigned long)file) {
		if (s->file == file && s->node == node && !s->dying)
			return s;
	}
	return NULL;
}

/* References to the file that are ours.  Under pcb_lock. */
static long pcb_stream_refs(const struct file *file)
{
	struct pcb_stream *s;
	long refs = 0;

	hash_for_each_possible (pcb_streams, s, hash, (unsigned long)file)
		refs += s->file == file && !s->dying;
	return refs;
}

static struct pcb_stream *pcb_stream_new(struct file *file, struct pcb_policy *p, s32 node)
{
	/* Hooks cannot sleep. */
	struct pcb_stream *s = kzalloc(sizeof(*s), GFP_NOWAIT | __GFP_NOWARN);

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
	return s;
}

/* Releases all a stream holds.  Not under pcb_lock; in a worker, since it may sleep. */
void pcb_stream_release(struct pcb_stream *s)
{
	/* At once, not through the delayed list: an unmount may be waiting. */
	__fput_sync(s->file);
	mem_cgroup_put(s->memcg);
	if (s->blkcg)
		css_put(s->blkcg);
	pcb_policy_put(s->policy);
}

static struct pcb_extent *pcb_extent_at(struct pcb_stream *s, unsigned int i)
{
	return &s->extents[(s->first + i) % PCB_STREAM_EXTENTS];
}

/* Under pcb_lock.  Returns false when the ring is full. */
static bool pcb_stream_push(struct pcb_stream *s, const struct pcb_extent *e)
{
	if (s->count) {
		struct pcb_extent *last = pcb_extent_at(s, s->count - 1);

		if (last->op == e->op && last->end == e->start && last->order == e->order &&
		    last->mark_step == e->mark_step &&
		    (!e->mark_step || (e->start - last->mark) % e->mark_step == 0)) {
			last->end = e->end;
			return true;
		}
	}
	if (s->count == PCB_STREAM_EXTENTS)
		return false;
	*pcb_extent_at(s, s->count) = *e;
	s->count++;
	return true;
}

/* Takes a piece of at most one chunk off the front; a marker is always on its first page. */
struct pcb_extent pcb_stream_pop(struct pcb_stream *s)
{
	struct pcb_extent *e = pcb_extent_at(s, 0);
	struct pcb_extent piece = *e;

	piece.end = min_t(pgoff_t, e->end, e->start + PCB_CHUNK_PAGES);
	if (e->mark == e->start)
		e->mark = e->mark_step ? e->mark + e->mark_step : PAGECACHE_NO_MARK;
	else
		piece.mark = PAGECACHE_NO_MARK;
	if (e->mark > e->start && e->mark < piece.end)
		piece.end = e->mark;
	e->start = piece.end;
	if (e->start == e->end) {
		s->first = (s->first + 1) % PCB_STREAM_EXTENTS;
		s->count--;
	}
	return piece;
}

/* Forgets what is queued.  Under pcb_lock.  Returns pages. */
u64 pcb_stream_cancel(struct pcb_stream *s)
{
	u64 pages = 0;
	unsigned int i;

	for (i = 0; i < s->count; i++) {
		struct pcb_extent *e = pcb_extent_at(s, i);

		if (e->op == PCB_OP_READ)
			pages += e->end - e->start;
	}
	s->count = 0;
	atomic64_sub(pages, &s->policy->inflight);
	pcb_count(s->policy, prefetch_cancelled_bytes, pages << PAGE_SHIFT);
	return pages;
}

/* A stream without work stays on its node's list until a worker has released it. */
static void pcb_stream_wake(struct pcb_stream *s)
{
	struct pcb_node *node = pcb_nodes[s->node];

	if (list_empty(&s->ready))
		list_add_tail(&s->ready, &node->ready);
	wake_up(&node->wait);
}

static int pcb_enqueue(struct pcb_policy *p, struct file *file, s32 node,
		       const struct pcb_extent *e)
{
	struct pcb_stream *s, *fresh = NULL;
	bool queued;

	spin_lock(&pcb_lock);
	s = pcb_stream_find(file, node);
	if (!s) {
		s = fresh = pcb_stream_new(file, p, node);
		if (!s) {
			spin_unlock(&pcb_lock);
			return -ENOMEM;
		}
		hash_add(pcb_streams, &s->hash, (unsigned long)file);
	}
	queued = pcb_stream_push(s, e);
	if (queued && e->op == PCB_OP_READ)
		atomic64_add(e->end - e->start, &s->policy->inflight);
	if (queued)
		pcb_stream_wake(s);
	spin_unlock(&pcb_lock);
	return queued ? 0 : -ENOSPC;
}

static s64 pcb_refuse(struct pcb_call *call, s64 err)
{
	pcb_count(call->policy, refused_calls, 1);
	return err;
}

s64 pcb_prefetch_queue(struct pcb_call *call, pgoff_t start, u64 nr, s32 node, u32 mark_step)
{
	struct pcb_policy *p = call->policy;
	u64 bound = pcb_mib_to_pages(pcb_max_inflight_mib);
	u64 inflight = max_t(s64, atomic64_read(&p->inflight), 0);
	struct pcb_extent e = { .op = PCB_OP_READ };
	int err;

	if (!call->file || start >= call->ctx.file_pages || !nr)
		return pcb_refuse(call, -EINVAL);
	if (inflight >= bound)
		return pcb_refuse(call, -EDQUOT);
	nr = min(nr, call->ctx.file_pages - start);
	nr = min_t(u64, nr, pcb_mib_to_pages(pcb_max_extent_mib));
	nr = min(nr, bound - inflight);
	if (!pcb_node_known(node))
		node = numa_node_id();
	if (!pcb_node_known(node))
		return pcb_refuse(call, -EINVAL);

	e.start = start;
	e.end = start + nr;
	e.mark_step = mark_step ? max_t(u32, mark_step, PCB_MIN_MARK_STEP) : 0;
	e.mark = mark_step ? start : PAGECACHE_NO_MARK;
	e.order = PAGECACHE_ORDER_AUTO;
	err = pcb_enqueue(p, call->file, node, &e);
	if (err)
		return pcb_refuse(call, err);
	pcb_count(p, prefetch_calls, 1);
	pcb_count(p, prefetch_bytes, nr << PAGE_SHIFT);
	return nr;
}

/*
 * Drops what can be dropped of [start, end).  Returns pages; the function's own count has the marks
 * that evicted pages left behind in it.
 */
u64 pcb_drop_now(struct address_space *mapping, pgoff_t start, pgoff_t end)
{
	u64 before = READ_ONCE(mapping->nrpages);
	u64 count = invalidate_mapping_pages(mapping, start, end - 1);
	u64 after = READ_ONCE(mapping->nrpages);

	return before > after ? min(count, before - after) : 0;
}

static s64 pcb_drop_note(struct pcb_call *call, pgoff_t start, u64 nr)
{
	struct pcb_drops *drops = call->drops;

	if (drops->nr == ARRAY_SIZE(drops->at))
		return pcb_refuse(call, -ENOSPC);
	drops->at[drops->nr].start = start;
	drops->at[drops->nr].end = start + nr;
	drops->nr++;
	pcb_count(call->policy, drop_calls, 1);
	return nr;
}

s64 pcb_drop_queue(struct pcb_call *call, pgoff_t start, u64 nr)
{
	struct pcb_extent e = { .op = PCB_OP_DROP, .mark = PAGECACHE_NO_MARK };
	s32 node = numa_node_id();
	int err;

	if (start >= call->ctx.file_pages || !nr)
		return pcb_refuse(call, -EINVAL);
	nr = min(nr, call->ctx.file_pages - start);
	if (call->drops)
		return pcb_drop_note(call, start, nr);
	if (!call->file || !pcb_node_known(node))
		return pcb_refuse(call, -EINVAL);
	e.start = start;
	e.end = start + nr;
	err = pcb_enqueue(call->policy, call->file, node, &e);
	if (err)
		return pcb_refuse(call, err);
	pcb_count(call->policy, drop_calls, 1);
	return nr;
}

s64 pcb_prefetch_cancel_file(struct file *file)
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

void pcb_prefetch_cancel_policy(struct pcb_policy *p)
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
bool pcb_sb_busy(const struct super_block *sb)
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

void pcb_prefetch_drain_sb(struct super_block *sb)
{
	wait_event_timeout(pcb_progress, !pcb_sb_busy(sb), PCB_DRAIN_TIMEOUT);
}

bool pcb_reader_gone(struct pcb_stream *s)
{
	return file_count(s->file) <= pcb_stream_refs(s->file) || !file_inode(s->file)->i_nlink;
}

/* True when @file has nothing queued on @node. */
static bool pcb_stream_submitted(struct file *file, s32 node)
{
	struct pcb_stream *s;
	bool done;

	spin_lock(&pcb_lock);
	s = pcb_stream_find(file, node);
	done = !s || (!s->count && !s->running);
	spin_unlock(&pcb_lock);
	return done;
}

/*
 * Read for a reader whose answer names another node.  Its worker allocates and submits; the
 * reader waits until that is done (not for the data), or goes on by itself after a while.
 */
void pcb_read_on_node(struct pcb_policy *p, struct file *file, pgoff_t start, unsigned long nr,
		      pgoff_t mark, unsigned int order, s32 node)
{
	struct pcb_extent e = {
		.op = PCB_OP_READ,
		.start = start,
		.end = start + nr,
		.mark = mark,
		.order = order,
	};

	if (pcb_enqueue(p, file, node, &e)) {
		pcb_count(p, refused_calls, 1);
		return;
	}
	/* A read that must not block (IOCB_NOWAIT) comes with this flag set. */
	if (current->flags & PF_MEMALLOC_NOIO)
		return;
	wait_event_killable_timeout(pcb_progress, pcb_stream_submitted(file, node),
				    PCB_SUBMIT_TIMEOUT);
}
