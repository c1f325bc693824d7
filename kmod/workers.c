// SPDX-License-Identifier: GPL-2.0-only
/*
 * workers.c - the threads that carry out what streams.c has queued.
 *
 * Each NUMA node with CPUs has a few of them, bound to it, so that the pages they allocate land
 * there.  They take pieces of a stream in file order, so that any number of workers still reads
 * sequentially.
 */
#include <linux/blk-cgroup.h>
#include <linux/kthread.h>
#include <linux/memcontrol.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/topology.h>

#include "prefetch.h"
#include "streams.h"

struct pcb_node *pcb_nodes[MAX_NUMNODES];

bool pcb_node_known(s32 node)
{
	return node >= 0 && node < MAX_NUMNODES && pcb_nodes[node];
}

/* A stream without work stays on its node's list until a worker has released it. */
void pcb_node_wake(s32 id, struct pcb_stream *s)
{
	struct pcb_node *node = pcb_nodes[id];

	lockdep_assert_held(&pcb_lock);
	if (list_empty(&s->ready))
		list_add_tail(&s->ready, &node->ready);
	wake_up(&node->wait);
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
	struct pcb_plan plan = {
		.start = piece->start,
		.nr = piece->end - piece->start,
		.mark = piece->mark,
		.order = pcb_order_for(piece),
	};

#ifdef CONFIG_BLK_CGROUP
	kthread_associate_blkcg(s->blkcg);
#endif
	if (piece->op == PCB_OP_READ) {
		pcb_read_here(s->file, mapping, &plan);
		pcb_count(s->policy, prefetch_issued_bytes, (u64)plan.nr << PAGE_SHIFT);
	} else {
		u64 n = pcb_drop_now(mapping, piece->start, piece->end);

		pcb_count(s->policy, drop_bytes, n << PAGE_SHIFT);
	}
#ifdef CONFIG_BLK_CGROUP
	kthread_associate_blkcg(NULL);
#endif
	set_active_memcg(old);
}

/* One turn of a worker.  Under pcb_lock, which it lets go of while it reads. */
static void pcb_turn(struct pcb_node *node)
{
	struct pcb_stream *s = list_first_entry(&node->ready, struct pcb_stream, ready);
	struct pcb_extent piece;

	if (s->queue.count && pcb_reader_gone(s))
		pcb_stream_cancel(s);
	if (!s->queue.count) {
		if (s->running)
			list_del_init(&s->ready); /* the last of them finishes it */
		else
			pcb_stream_release(s);
		return;
	}
	piece = pcb_queue_pop(&s->queue, PCB_CHUNK_PAGES, PCB_DROP_PAGES);
	s->running++;
	/* Other streams have their turn; and other workers can go on with this one. */
	list_move_tail(&s->ready, &node->ready);
	if (s->queue.count)
		wake_up(&node->wait);
	spin_unlock(&pcb_lock);
	pcb_work(s, &piece);
	/* Only now: a policy that minds its budget must see the pages as queued or as resident. */
	if (piece.op == PCB_OP_READ)
		atomic64_sub(piece.end - piece.start, &s->policy->inflight);
	cond_resched();
	spin_lock(&pcb_lock);
	s->running--;
	if (!s->queue.count && !s->running && list_empty(&s->ready))
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

int pcb_workers_start(void)
{
	int id;

	for_each_node_state (id, N_CPU) {
		struct pcb_node *node = pcb_node_start(id);

		if (IS_ERR(node)) {
			pcb_workers_stop();
			return PTR_ERR(node);
		}
		pcb_nodes[id] = node;
	}
	return 0;
}

/* Nothing is queued and nothing new comes in. */
void pcb_workers_stop(void)
{
	int id;

	for (id = 0; id < MAX_NUMNODES; id++) {
		if (pcb_nodes[id])
			pcb_node_stop(pcb_nodes[id]);
		pcb_nodes[id] = NULL;
	}
}
