// SPDX-License-Identifier: GPL-2.0-only
/*
 * prefetch.c - reads and drops extents on behalf of a reader, asynchronously.
 *
 * Each NUMA node with CPUs has a few worker threads bound to it, so that the pages they
 * allocate land there.  What is queued for one open file and node is a stream: it holds
 * one reference to the reader's file and to the cgroups to charge, and is gone with its
 * last extent.  Workers take pieces of a stream in file order, so that any number of
 * them still reads sequentially.
 *
 * A stream never keeps a file alive for its own sake: when its reference is the only one
 * left (the reader has closed the file and unmapped it), or the file has been deleted, the
 * rest of it is cancelled.
 */
#include <linux/blk-cgroup.h>
#include <linux/cgroup.h>
#include <linux/file.h>
#include <linux/hashtable.h>
#include <linux/kthread.h>
#include <linux/memcontrol.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/topology.h>

#include "pagecache.h"

#define PCB_STREAM_EXTENTS 64
#define PCB_MIN_MARK_STEP 16 /* pages: a marker costs a call of the policy */
#define PCB_DRAIN_TIMEOUT (5 * HZ)
#define PCB_SUBMIT_TIMEOUT (HZ / 4)

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

static DEFINE_SPINLOCK(pcb_lock); /* everything below */
static DEFINE_HASHTABLE(pcb_streams, 8);
static struct pcb_node *pcb_nodes[MAX_NUMNODES];
static DECLARE_WAIT_QUEUE_HEAD(pcb_progress); /* a piece was done, or a stream has gone */

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
static void pcb_stream_release(struct pcb_stream *s)
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
static struct pcb_extent pcb_stream_pop(struct pcb_stream *s)
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
	if (piece.op == PCB_OP_READ)
		atomic64_sub(piece.end - piece.start, &s->policy->inflight);
	return piece;
}

/* Forgets what is queued.  Under pcb_lock.  Returns pages. */
static u64 pcb_stream_cancel(struct pcb_stream *s)
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

s64 pcb_drop_queue(struct pcb_call *call, pgoff_t start, u64 nr)
{
	struct pcb_extent e = { .op = PCB_OP_DROP, .mark = PAGECACHE_NO_MARK };
	s32 node = numa_node_id();
	int err;

	if (!call->file || start >= call->ctx.file_pages || !nr || !pcb_node_known(node))
		return pcb_refuse(call, -EINVAL);
	nr = min(nr, call->ctx.file_pages - start);
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

void pcb_prefetch_drain_sb(struct super_block *sb)
{
	wait_event_timeout(pcb_progress, !pcb_sb_busy(sb), PCB_DRAIN_TIMEOUT);
}

static u32 pcb_order_for(const struct pcb_extent *piece)
{
	if (piece->order != PAGECACHE_ORDER_AUTO)
		return piece->order;
	/* The kernel adds 2: folios of 256 KiB where the file system takes them. */
	return piece->end - piece->start >= 64 ? 4 : 0;
}

/* Do one piece, charged to the reader. */
static void pcb_work(struct pcb_stream *s, const struct pcb_extent *piece)
{
	struct address_space *mapping = s->file->f_mapping;
	struct mem_cgroup *old = set_active_memcg(s->memcg);

#ifdef CONFIG_BLK_CGROUP
	kthread_associate_blkcg(s->blkcg);
#endif
	if (piece->op == PCB_OP_READ) {
		pcb_readahead_issue(s->file, mapping, piece->start, piece->end - piece->start,
				    piece->mark, pcb_order_for(piece));
		pcb_count(s->policy, prefetch_issued_bytes,
			  (u64)(piece->end - piece->start) << PAGE_SHIFT);
	} else {
		u64 n = invalidate_mapping_pages(mapping, piece->start, piece->end - 1);

		pcb_count(s->policy, drop_bytes, n << PAGE_SHIFT);
	}
#ifdef CONFIG_BLK_CGROUP
	kthread_associate_blkcg(NULL);
#endif
	set_active_memcg(old);
}

static bool pcb_reader_gone(struct pcb_stream *s)
{
	return file_count(s->file) <= pcb_stream_refs(s->file) || !file_inode(s->file)->i_nlink;
}

/* Release a stream that has nothing left.  Called and returns with pcb_lock held. */
static void pcb_stream_finish(struct pcb_stream *s)
{
	s->dying = true;
	list_del_init(&s->ready);
	spin_unlock(&pcb_lock);
	pcb_stream_release(s);
	spin_lock(&pcb_lock);
	hash_del(&s->hash);
	kfree(s);
	wake_up_all(&pcb_progress);
}

/* One turn of a worker.  Under pcb_lock, which it lets go of while it reads. */
static void pcb_turn(struct pcb_node *node)
{
	struct pcb_stream *s = list_first_entry(&node->ready, struct pcb_stream, ready);
	struct pcb_extent piece;

	if (s->count && pcb_reader_gone(s))
		pcb_stream_cancel(s);
	if (!s->count) {
		if (s->running)
			list_del_init(&s->ready); /* the last of them finishes it */
		else
			pcb_stream_finish(s);
		return;
	}
	piece = pcb_stream_pop(s);
	s->running++;
	/* Other streams have their turn; and other workers can go on with this one. */
	list_move_tail(&s->ready, &node->ready);
	if (s->count)
		wake_up(&node->wait);
	spin_unlock(&pcb_lock);
	pcb_work(s, &piece);
	cond_resched();
	spin_lock(&pcb_lock);
	s->running--;
	if (!s->count && !s->running && list_empty(&s->ready))
		list_add_tail(&s->ready, &node->ready);
	wake_up_all(&pcb_progress);
}

static int pcb_worker(void *data)
{
	struct pcb_node *node = data;

	spin_lock(&pcb_lock);
	for (;;) {
		if (!list_empty(&node->ready)) {
			pcb_turn(node);
			continue;
		}
		spin_unlock(&pcb_lock);
		wait_event_idle(node->wait, !list_empty(&node->ready) || kthread_should_stop());
		spin_lock(&pcb_lock);
		if (list_empty(&node->ready) && kthread_should_stop())
			break;
	}
	spin_unlock(&pcb_lock);
	return 0;
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

static void pcb_node_stop(struct pcb_node *node)
{
	while (node->workers)
		kthread_stop(node->threads[--node->workers]);
	kfree(node->threads);
	kfree(node);
}

static struct pcb_node *pcb_node_start(int id)
{
	struct pcb_node *node = kzalloc_node(sizeof(*node), GFP_KERNEL, id);
	struct task_struct *task;

	if (!node)
		return ERR_PTR(-ENOMEM);
	INIT_LIST_HEAD(&node->ready);
	init_waitqueue_head(&node->wait);
	node->threads = kcalloc(pcb_workers, sizeof(*node->threads), GFP_KERNEL);
	if (!node->threads) {
		kfree(node);
		return ERR_PTR(-ENOMEM);
	}
	while (node->workers < pcb_workers) {
		task = kthread_create_on_node(pcb_worker, node, id, "pagecache/%d:%u", id,
					      node->workers);
		if (IS_ERR(task)) {
			pcb_node_stop(node);
			return ERR_CAST(task);
		}
		set_cpus_allowed_ptr(task, cpumask_of_node(id));
		node->threads[node->workers++] = task;
		wake_up_process(task);
	}
	return node;
}

int pcb_prefetch_start(void)
{
	int id;

	for_each_node_state (id, N_CPU) {
		struct pcb_node *node = pcb_node_start(id);

		if (IS_ERR(node)) {
			pcb_prefetch_stop();
			return PTR_ERR(node);
		}
		pcb_nodes[id] = node;
	}
	return 0;
}

/* No policy is attached and no hook runs: nothing new comes in. */
void pcb_prefetch_stop(void)
{
	int id;

	wait_event(pcb_progress, !pcb_sb_busy(NULL));
	for (id = 0; id < MAX_NUMNODES; id++) {
		if (pcb_nodes[id])
			pcb_node_stop(pcb_nodes[id]);
		pcb_nodes[id] = NULL;
	}
}
