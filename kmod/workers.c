// SPDX-License-Identifier: GPL-2.0-only
/*
 * workers.c - the threads that carry out what streams.c has queued.
 *
 * Each NUMA node with CPUs has a few of them, bound to it, so that the pages they allocate land
 * there.  They take pieces of a stream in file order, so that any number of workers still reads
 * sequentially.  A workqueue would not do: its workers cannot be bound to a node by a module.
 *
 * One of a node's workers is always idle: whoever would be the last to begin work starts another
 * one first.  So a domain that blocks its workers (streams.h) does not stop the others.
 */
#include <linux/blk-cgroup.h>
#include <linux/kthread.h>
#include <linux/memcontrol.h>
#include <linux/page_counter.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/topology.h>

#include "placement.h"
#include "prefetch.h"
#include "streams.h"

#define PCB_MAX_THREADS 64 /* of one node */

struct pcb_node {
	int id;
	struct list_head domains;
	wait_queue_head_t wait;
	unsigned int threads, working;
	bool starting; /* a thread */
	struct task_struct *thread[PCB_MAX_THREADS];
};

static struct pcb_node *pcb_nodes[MAX_NUMNODES];

bool pcb_node_known(s32 node)
{
	return node >= 0 && node < MAX_NUMNODES && pcb_nodes[node];
}

/* The domain of a new stream; NULL: no memory. */
struct pcb_domain *pcb_domain_get(s32 node, const struct super_block *sb,
				  const struct mem_cgroup *memcg)
{
	struct pcb_domain *domain;

	lockdep_assert_held(&pcb_lock);
	list_for_each_entry (domain, &pcb_nodes[node]->domains, list) {
		if (domain->sb == sb && domain->memcg == memcg) {
			domain->streams++;
			return domain;
		}
	}
	domain = kzalloc(sizeof(*domain), GFP_NOWAIT | __GFP_NOWARN);
	if (!domain)
		return NULL;
	INIT_LIST_HEAD(&domain->ready);
	domain->sb = sb;
	domain->memcg = memcg;
	domain->streams = 1;
	list_add_tail(&domain->list, &pcb_nodes[node]->domains);
	return domain;
}

/* A stream has gone. */
void pcb_domain_put(struct pcb_domain *domain)
{
	lockdep_assert_held(&pcb_lock);
	if (--domain->streams)
		return;
	list_del(&domain->list);
	kfree(domain);
}

static bool pcb_domain_ready(const struct pcb_domain *domain)
{
	lockdep_assert_held(&pcb_lock);
	return !list_empty(&domain->ready) && domain->running < pcb_workers;
}

static struct pcb_domain *pcb_next_domain(const struct pcb_node *node)
{
	struct pcb_domain *domain;

	lockdep_assert_held(&pcb_lock);
	list_for_each_entry (domain, &node->domains, list) {
		if (pcb_domain_ready(domain))
			return domain;
	}
	return NULL;
}

/* A stream without work stays on its domain's list until a worker has released it. */
void pcb_stream_wake(struct pcb_stream *s)
{
	lockdep_assert_held(&pcb_lock);
	if (list_empty(&s->ready))
		list_add_tail(&s->ready, &s->domain->ready);
	if (pcb_domain_ready(s->domain))
		wake_up(&pcb_nodes[s->key.node]->wait);
}

/*
 * Whether the cgroup, or one above it, is clearly above its memory.high: what is read for it now
 * would be thrown out at once, and the worker would be made to sleep for it.
 */
static bool pcb_throttled(struct mem_cgroup *memcg)
{
#ifdef CONFIG_MEMCG
	for (; memcg; memcg = parent_mem_cgroup(memcg)) {
		unsigned long high = READ_ONCE(memcg->memory.high);

		if (page_counter_read(&memcg->memory) > high + high / 64)
			return true;
	}
#endif
	return false;
}

static void pcb_work_read(struct pcb_stream *s, const struct pcb_extent *piece)
{
	struct pcb_plan plan = {
		.start = piece->start,
		.nr = piece->end - piece->start,
		.mark = piece->mark,
		.order = piece->order,
		.dropbehind = piece->dropbehind,
	};
	struct mempolicy *old;

	if (pcb_throttled(s->key.memcg)) {
		pcb_count(s->key.policy, prefetch_cancelled_bytes, (u64)plan.nr << PAGE_SHIFT);
		return;
	}
	old = pcb_mempolicy_set(s->key.mempolicy);
	pcb_read_here(s->key.file, s->key.file->f_mapping, &plan);
	pcb_mempolicy_set(old);
	pcb_count(s->key.policy, prefetch_issued_bytes, (u64)plan.nr << PAGE_SHIFT);
}

/* Do one piece, charged to the reader. */
static void pcb_work(struct pcb_stream *s, const struct pcb_extent *piece)
{
	struct mem_cgroup *old = set_active_memcg(s->key.memcg);

#ifdef CONFIG_BLK_CGROUP
	kthread_associate_blkcg(s->blkcg);
#endif
	if (piece->op == PCB_OP_READ)
		pcb_work_read(s, piece);
	else
		pcb_count(s->key.policy, drop_bytes,
			  pcb_drop_now(s->key.file->f_mapping, piece->start, piece->end)
				  << PAGE_SHIFT);
#ifdef CONFIG_BLK_CGROUP
	kthread_associate_blkcg(NULL);
#endif
	set_active_memcg(old);
}

/* One turn of a worker.  With pcb_lock held, which it lets go of while it reads. */
static void pcb_turn(struct pcb_node *node, struct pcb_domain *domain)
{
	struct pcb_stream *s;
	struct pcb_extent piece;

	lockdep_assert_held(&pcb_lock);
	s = list_first_entry(&domain->ready, struct pcb_stream, ready);
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
	s->running_demand += piece.demand;
	domain->running++;
	/* Other streams and domains have their turn; other workers can go on with this one. */
	list_move_tail(&s->ready, &domain->ready);
	list_move_tail(&domain->list, &node->domains);
	if (pcb_next_domain(node))
		wake_up(&node->wait);
	spin_unlock(&pcb_lock);
	pcb_work(s, &piece);
	/* Counted down last, so that pages are seen either as in flight or as resident. */
	if (piece.op == PCB_OP_READ)
		atomic64_sub(piece.end - piece.start, &s->key.policy->inflight);
	cond_resched_tasks_rcu_qs();
	spin_lock(&pcb_lock);
	domain->running--;
	s->running--;
	s->running_demand -= piece.demand;
	if (!s->queue.count && !s->running && list_empty(&s->ready))
		list_add_tail(&s->ready, &domain->ready);
	wake_up_all(&pcb_progress);
}

static bool pcb_node_has_work(const struct pcb_node *node)
{
	bool has;

	spin_lock(&pcb_lock);
	has = pcb_next_domain(node);
	spin_unlock(&pcb_lock);
	return has;
}

/* Whether all workers but the one that asks are at work, and another one may be started. */
static bool pcb_last_idle(const struct pcb_node *node)
{
	lockdep_assert_held(&pcb_lock);
	return node->threads - node->working < 2 && !node->starting &&
	       node->threads < PCB_MAX_THREADS;
}

static int pcb_thread_start(struct pcb_node *node);

static int pcb_worker(void *data)
{
	struct pcb_node *node = data;
	struct pcb_domain *domain;

	spin_lock(&pcb_lock);
	for (;;) {
		domain = pcb_next_domain(node);
		if (domain && pcb_last_idle(node)) {
			node->starting = true;
			spin_unlock(&pcb_lock);
			/* If none can be started, only what blocked workers hold has to wait. */
			pcb_thread_start(node);
			spin_lock(&pcb_lock);
			node->starting = false;
			domain = pcb_next_domain(node);
		}
		if (domain) {
			node->working++;
			pcb_turn(node, domain);
			node->working--;
			continue;
		}
		if (kthread_should_stop())
			break;
		spin_unlock(&pcb_lock);
		wait_event_idle_exclusive(node->wait,
					  pcb_node_has_work(node) || kthread_should_stop());
		spin_lock(&pcb_lock);
	}
	spin_unlock(&pcb_lock);
	return 0;
}

static int pcb_thread_start(struct pcb_node *node)
{
	struct task_struct *task = kthread_create_on_node(
		pcb_worker, node, node->id, "pagecache/%d:%u", node->id, READ_ONCE(node->threads));

	if (IS_ERR(task))
		return PTR_ERR(task);
	set_cpus_allowed_ptr(task, cpumask_of_node(node->id));
	spin_lock(&pcb_lock);
	node->thread[node->threads++] = task;
	spin_unlock(&pcb_lock);
	wake_up_process(task);
	return 0;
}

/* A thread that is being stopped may have started another one. */
static void pcb_node_stop(struct pcb_node *node)
{
	struct task_struct *task;

	for (;;) {
		spin_lock(&pcb_lock);
		task = node->threads ? node->thread[--node->threads] : NULL;
		spin_unlock(&pcb_lock);
		if (!task)
			break;
		kthread_stop(task);
	}
	kfree(node);
}

static struct pcb_node *pcb_node_start(int id)
{
	struct pcb_node *node = kzalloc_node(sizeof(*node), GFP_KERNEL, id);
	int err;

	if (!node)
		return ERR_PTR(-ENOMEM);
	node->id = id;
	INIT_LIST_HEAD(&node->domains);
	init_waitqueue_head(&node->wait);
	while (node->threads < pcb_workers) {
		err = pcb_thread_start(node);
		if (err) {
			pcb_node_stop(node);
			return ERR_PTR(err);
		}
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

/* Each stream holds the module: nothing is queued. */
void pcb_workers_stop(void)
{
	int id;

	for (id = 0; id < MAX_NUMNODES; id++) {
		if (pcb_nodes[id])
			pcb_node_stop(pcb_nodes[id]);
		pcb_nodes[id] = NULL;
	}
}
