// SPDX-License-Identifier: GPL-2.0-only
/* policy.c - a policy from its attachment to its end, and what it may take. */
#include <linux/slab.h>
#include <linux/timekeeping.h>

#include "streams.h"
#include "tags.h"

DEFINE_MUTEX(pcb_mutex);
LIST_HEAD(pcb_policies);

static void pcb_policy_free(struct kref *ref)
{
	struct pcb_policy *p = container_of(ref, struct pcb_policy, ref);

	free_percpu(p->counters);
	kfree_rcu(p, rcu);
}

void pcb_policy_put(struct pcb_policy *p)
{
	kref_put(&p->ref, pcb_policy_free);
}

void pcb_policy_counters(struct pcb_policy *p, u64 *out)
{
	int cpu, i;

	memset(out, 0, PAGECACHE_COUNTER_NR * sizeof(*out));
	for_each_possible_cpu (cpu) {
		u64 *counters = per_cpu_ptr(p->counters, cpu);

		for (i = 0; i < PAGECACHE_COUNTER_NR; i++)
			out[i] += READ_ONCE(counters[i]);
	}
}

/* The policy of that name that has not ended, or NULL. */
struct pcb_policy *pcb_policy_find(const char *name)
{
	struct pcb_policy *p;

	lockdep_assert_held(&pcb_mutex);
	list_for_each_entry (p, &pcb_policies, list) {
		if (!strncmp(p->name, name, sizeof(p->name)) && !test_bit(PCB_ENDED, &p->ended))
			return p;
	}
	return NULL;
}

/* Makes the policy unreachable and publishes its record.  Once for each policy. */
void pcb_policy_finish(struct pcb_policy *p)
{
	lockdep_assert_held(&pcb_mutex);
	if (test_and_set_bit(PCB_FINISHED, &p->ended))
		return;
	pcb_tags_unbind(p);
	pcb_cancel_policy(p);
	if (p->kdata->exit)
		p->kdata->exit(&p->record);
	pcb_exit_push(&p->record);
}

static void pcb_policy_end_work(struct work_struct *work)
{
	struct pcb_policy *p = container_of(work, struct pcb_policy, end_work);

	mutex_lock(&pcb_mutex);
	/* unreg may have been faster: then kdata is gone and the policy is finished. */
	pcb_policy_finish(p);
	mutex_unlock(&pcb_mutex);
	pcb_policy_put(p);
}

/*
 * The policy has failed or asked to go: from here on it is not asked any more, and the
 * kernel decides by itself.  Any context; the rest is done by a work item.
 */
void pcb_policy_end(struct pcb_policy *p, enum pagecache_exit_kind kind, s64 code,
		    enum pagecache_hook hook, const char *reason, const char *message)
{
	if (test_and_set_bit(PCB_ENDED, &p->ended))
		return;
	RCU_INIT_POINTER(p->ops, NULL);
	pcb_exit_record(&p->record, p->name, kind, code, hook, reason, message);
	kref_get(&p->ref);
	queue_work(pcb_wq, &p->end_work);
}

/* An answer that makes no sense. */
void pcb_policy_invalid(struct pcb_policy *p, enum pagecache_hook hook, const char *what)
{
	pcb_count(p, invalid_answers, 1);
	if (atomic_inc_return(&p->invalid) >= pcb_max_invalid)
		pcb_policy_end(p, PAGECACHE_EXIT_INVALID, -EINVAL, hook, "too many invalid answers",
			       what);
}

/*
 * How many times as long as evict a hook may take.  readahead and access delay a reader that, but
 * for hits, waits for a device anyway; removed runs with interrupts off; pressure is called by a
 * worker, for which nobody waits.
 */
static const unsigned int pcb_lenience[PAGECACHE_HOOK_NR] = {
	[PAGECACHE_HOOK_READAHEAD] = 40, [PAGECACHE_HOOK_ACCESS] = 40,
	[PAGECACHE_HOOK_ADDED] = 10,	 [PAGECACHE_HOOK_REMOVED] = 10,
	[PAGECACHE_HOOK_EVICT] = 1,	 [PAGECACHE_HOOK_PRESSURE] = 400,
};

/*
 * Takes note of how long a hook took that was called at @since_ns, and ends a policy that takes too
 * long.  A single call may have been interrupted, so a running average over about 16 calls decides,
 * in which each counts as at most four times the bound.
 */
void pcb_policy_took(struct pcb_policy *p, enum pagecache_hook hook, u64 since_ns)
{
	u64 bound = (u64)pcb_max_evict_us * NSEC_PER_USEC * pcb_lenience[hook];
	u64 took = ktime_get_mono_fast_ns() - since_ns;
	u64 average = READ_ONCE(p->took_ns[hook]);
	char message[64];

	if (took > bound)
		pcb_count(p, slow_calls, 1);
	average = average - average / 16 + min(took, 4 * bound) / 16;
	WRITE_ONCE(p->took_ns[hook], average);
	if (average <= bound)
		return;
	snprintf(message, sizeof(message), "the bound is %u times max_evict_us of the module",
		 pcb_lenience[hook]);
	pcb_policy_end(p, PAGECACHE_EXIT_SLOW, -ETIME, hook, "it took too long over its answers",
		       message);
}

static u32 pcb_hooks_of(const struct pagecache_ops *ops)
{
	return (ops->init ? BIT(PAGECACHE_HOOK_INIT) : 0) |
	       (ops->exit ? BIT(PAGECACHE_HOOK_EXIT) : 0) |
	       (ops->readahead ? BIT(PAGECACHE_HOOK_READAHEAD) : 0) |
	       (ops->access ? BIT(PAGECACHE_HOOK_ACCESS) : 0) |
	       (ops->added ? BIT(PAGECACHE_HOOK_ADDED) : 0) |
	       (ops->removed ? BIT(PAGECACHE_HOOK_REMOVED) : 0) |
	       (ops->evict ? BIT(PAGECACHE_HOOK_EVICT) : 0) |
	       (ops->pressure ? BIT(PAGECACHE_HOOK_PRESSURE) : 0);
}

struct pcb_policy *pcb_policy_alloc(struct pagecache_ops *ops)
{
	struct pcb_policy *p = kzalloc(sizeof(*p), GFP_KERNEL);

	if (!p)
		return NULL;
	p->counters = __alloc_percpu(PAGECACHE_COUNTER_NR * sizeof(u64), sizeof(u64));
	if (!p->counters) {
		kfree(p);
		return NULL;
	}
	kref_init(&p->ref);
	INIT_WORK(&p->end_work, pcb_policy_end_work);
	p->kdata = ops;
	p->hooks = pcb_hooks_of(ops);
	p->keep_max = pcb_max_keep_pages();
	strscpy(p->name, ops->name, sizeof(p->name));
	return p;
}
