/* SPDX-License-Identifier: GPL-2.0-only */
/* policy.h - an attached policy: its life, its counters, how it ended. */
#ifndef PCB_POLICY_H
#define PCB_POLICY_H

#include <linux/atomic.h>
#include <linux/bpf.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/percpu.h>
#include <linux/rcupdate.h>
#include <linux/workqueue.h>

#include "pagecache_ops.h"
#include "params.h"

/* Bits of pcb_policy.ended. */
enum {
	PCB_ENDED, /* it is not asked any more, and the record is being or has been written */
	PCB_FINISHED, /* pcb_policy_finish() has been called */
};

/*
 * A policy lives from its attachment until its link is released.  @ops is what hooks call; it turns
 * NULL as soon as the policy has ended, whatever the reason, and is read under RCU.  Other programs
 * may take the place of its own meanwhile (@ops, @kdata, @hooks).  The memory outlives its end for
 * work in flight (kref).
 */
struct pcb_policy {
	struct list_head list; /* pcb_policies, under pcb_mutex */
	struct kref ref;
	struct rcu_head rcu;
	struct pagecache_ops __rcu *ops;
	struct pagecache_ops *kdata; /* valid until unreg */
	u64 __percpu *counters;
	u64 seq;
	u64 attached_ns;
	u32 hooks; /* bit per enum pagecache_hook */
	atomic_t tags;
	atomic_t invalid;
	atomic64_t governed; /* pages in the cache */
	atomic64_t inflight; /* pages queued for prefetch */
	atomic64_t kept; /* pages in the cache that it keeps from being evicted */
	u64 keep_max; /* bound of kept */
	u64 took_ns[PAGECACHE_HOOK_NR]; /* running averages of what a call takes */
	unsigned long ended;
	struct pagecache_exit_record record;
	struct work_struct end_work;
	char name[PAGECACHE_NAME_LEN];
};

extern struct mutex pcb_mutex; /* policies, tags, models, exit records */
extern struct list_head pcb_policies;
extern struct workqueue_struct *pcb_wq; /* ends of policies */

/* policy.c */
struct pcb_policy *pcb_policy_alloc(struct pagecache_ops *ops);
void pcb_policy_put(struct pcb_policy *p);
struct pcb_policy *pcb_policy_find(const char *name);
void pcb_policy_finish(struct pcb_policy *p);
void pcb_policy_end(struct pcb_policy *p, enum pagecache_exit_kind kind, s64 code,
		    enum pagecache_hook hook, const char *reason, const char *message);
void pcb_policy_counters(struct pcb_policy *p, u64 *out);
void pcb_policy_invalid(struct pcb_policy *p, enum pagecache_hook hook, const char *what);
void pcb_policy_took(struct pcb_policy *p, enum pagecache_hook hook, u64 since_ns);

static inline void pcb_count_add(struct pcb_policy *p, enum pagecache_counter c, u64 n)
{
	this_cpu_add(p->counters[c], n);
}

#define pcb_count(p, name, n) pcb_count_add(p, PAGECACHE_COUNTER_##name, n)

/* attach.c: BPF attaches, replaces and detaches policies */
int pcb_reg(void *kdata, struct bpf_link *link);
int pcb_update(void *kdata, void *old_kdata, struct bpf_link *link);
void pcb_unreg(void *kdata, struct bpf_link *link);

/* struct_ops.c: what BPF may load */
int pcb_struct_ops_register(void);
int pcb_hook_of_program(const struct bpf_prog *prog);
const char *pcb_kfunc_name(u32 id);

/* kfuncs.c */
int pcb_kfuncs_register(void);

/* exits.c */
void pcb_exit_record(struct pagecache_exit_record *record, const char *policy,
		     enum pagecache_exit_kind kind, s64 code, enum pagecache_hook hook,
		     const char *reason, const char *message);
void pcb_exit_push(struct pagecache_exit_record *record);
int pcb_exit_next(struct pagecache_exit_record *record);

#endif /* PCB_POLICY_H */
