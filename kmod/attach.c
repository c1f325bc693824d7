// SPDX-License-Identifier: GPL-2.0-only
/*
 * attach.c - BPF attaches a policy, puts another in its place, and detaches it.
 */
#include <linux/capability.h>
#include <linux/rculist.h>
#include <linux/timekeeping.h>

#include "call.h"
#include "canary.h"
#include "hooks.h"

static u64 pcb_policy_seq;

#define PCB_DECIDING_HOOKS                                                                        \
	(BIT(PAGECACHE_HOOK_READAHEAD) | BIT(PAGECACHE_HOOK_ACCESS) | BIT(PAGECACHE_HOOK_ADDED) | \
	 BIT(PAGECACHE_HOOK_REMOVED) | BIT(PAGECACHE_HOOK_EVICT) | BIT(PAGECACHE_HOOK_PRESSURE))

/* Asks the policy's own init, before any hook can reach the policy. */
static int pcb_policy_init(struct pcb_policy *p)
{
	struct pcb_call call = { .policy = p, .hook = PAGECACHE_HOOK_INIT };
	int err;

	lockdep_assert_held(&pcb_mutex);
	if (!p->kdata->init)
		return 0;
	call.ctx.node = PAGECACHE_NODE_ANY;
	call.ctx.page_shift = PAGE_SHIFT;
	call.ctx.time_ns = ktime_get_mono_fast_ns();
	rcu_read_lock();
	err = p->kdata->init(&call.ctx);
	rcu_read_unlock();
	/* bpf_pagecache_exit() in init only fills the record (see kfuncs.c). */
	if (p->record.kind)
		return p->record.code < 0 && p->record.code >= -MAX_ERRNO ? p->record.code
									  : -ECANCELED;
	if (err > 0 || err < -MAX_ERRNO)
		err = -EINVAL;
	if (err)
		pcb_exit_record(&p->record, p->name, PAGECACHE_EXIT_INIT, err, PAGECACHE_HOOK_INIT,
				"init returned an error", NULL);
	return err;
}

/* Turns on what the policy's hooks need, and tries it.  After a failure nothing is on. */
static int pcb_policy_try_hooks(struct pcb_policy *p, const char **reason, const char **failed)
{
	int err;

	lockdep_assert_held(&pcb_mutex);
	*reason = "a hook could not be attached";
	err = pcb_hooks_get(p->hooks, failed);
	if (err)
		return err;
	*reason = "a hook does not run";
	err = pcb_canary_try(p->hooks, failed);
	if (err) {
		pr_err("policy %s: %s (%d)\n", p->name, *failed, err);
		pcb_hooks_put(p->hooks);
	}
	return err;
}

/* A policy for which its evict hook is optional does without where that cannot be had. */
static int pcb_policy_hook(struct pcb_policy *p)
{
	const char *reason, *failed = "";
	u32 others = p->hooks & ~BIT(PAGECACHE_HOOK_EVICT);
	int err = pcb_policy_try_hooks(p, &reason, &failed);

	if (err && p->kdata->flags & PAGECACHE_OPS_EVICT_OPTIONAL && others != p->hooks &&
	    others & PCB_DECIDING_HOOKS) {
		p->hooks = others;
		err = pcb_policy_try_hooks(p, &reason, &failed);
		if (!err)
			pr_info("policy %s: attached without its hook evict\n", p->name);
	}
	if (err)
		pcb_exit_record(&p->record, p->name, PAGECACHE_EXIT_HOOK, err, PAGECACHE_HOOK_INIT,
				reason, failed);
	return err;
}

/* All that can fail: afterwards the policy's hooks are on, and nobody asks it yet. */
static int pcb_policy_start(struct pcb_policy *p)
{
	int err;

	lockdep_assert_held(&pcb_mutex);
	if (!(p->hooks & PCB_DECIDING_HOOKS)) {
		pcb_exit_record(&p->record, p->name, PAGECACHE_EXIT_INIT, -EINVAL,
				PAGECACHE_HOOK_INIT, "the policy has no hook",
				"define at least one besides init and exit");
		return -EINVAL;
	}
	err = pcb_policy_init(p);
	return err ?: pcb_policy_hook(p);
}

static int pcb_policy_attach(struct pcb_policy *p)
{
	int err;

	lockdep_assert_held(&pcb_mutex);
	if (pcb_policy_find(p->name))
		return -EEXIST;
	err = pcb_policy_start(p);
	if (err)
		return err;
	p->seq = ++pcb_policy_seq;
	p->attached_ns = ktime_get_real_ns();
	rcu_assign_pointer(p->ops, p->kdata);
	list_add_tail_rcu(&p->list, &pcb_policies);
	pcb_tags_bind(p);
	return 0;
}

int pcb_reg(void *kdata, struct bpf_link *link)
{
	struct pcb_policy *p;
	int err;

	/*
	 * BPF asks for CAP_BPF and CAP_PERFMON only, which tracing tools have, too.  A policy
	 * decides for all readers of its files, and gets the tags of the last one of its name.
	 */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	p = pcb_policy_alloc(kdata);
	if (!p)
		return -ENOMEM;
	mutex_lock(&pcb_mutex);
	err = pcb_policy_attach(p);
	if (err && p->record.kind)
		pcb_exit_push(&p->record);
	mutex_unlock(&pcb_mutex);
	if (err)
		pcb_policy_put(p);
	return err;
}

static struct pcb_policy *pcb_policy_of(const void *kdata)
{
	struct pcb_policy *p;

	lockdep_assert_held(&pcb_mutex);
	list_for_each_entry (p, &pcb_policies, list) {
		if (p->kdata == kdata)
			return p;
	}
	return NULL;
}

void pcb_unreg(void *kdata, struct bpf_link *link)
{
	struct pcb_policy *p;

	mutex_lock(&pcb_mutex);
	p = pcb_policy_of(kdata);
	if (WARN_ON_ONCE(!p)) {
		mutex_unlock(&pcb_mutex);
		return;
	}
	if (!test_and_set_bit(PCB_ENDED, &p->ended)) {
		RCU_INIT_POINTER(p->ops, NULL);
		pcb_exit_record(&p->record, p->name, PAGECACHE_EXIT_DETACHED, 0,
				PAGECACHE_HOOK_EXIT, "detached", NULL);
	}
	/* After this a hook that is just ending the policy has written the exit record. */
	synchronize_rcu();
	pcb_policy_finish(p);
	list_del_rcu(&p->list);
	pcb_hooks_put(p->hooks);
	mutex_unlock(&pcb_mutex);
	/* Hooks that still see the policy or its ops run under RCU. */
	synchronize_rcu();
	pcb_policy_put(p);
}

/*
 * Puts the programs of @fresh in the place of those of @p, which stays what it is for everybody
 * else: its tags, what it keeps, its counters and what is in flight for it go on.  A hook is
 * answered by the old programs or by the new ones, never by nobody.
 */
static int pcb_policy_replace(struct pcb_policy *p, struct pcb_policy *fresh)
{
	struct pagecache_ops *old = p->kdata;
	u32 old_hooks = p->hooks;

	lockdep_assert_held(&pcb_mutex);
	pcb_tags_rekeep(p, old_hooks | fresh->hooks);
	WRITE_ONCE(p->hooks, fresh->hooks);
	p->kdata = fresh->kdata;
	rcu_assign_pointer(p->ops, fresh->kdata);
	/* Pairs with pcb_policy_end(), which sets the bit before it takes the programs away. */
	smp_mb();
	if (test_bit(PCB_ENDED, &p->ended)) {
		RCU_INIT_POINTER(p->ops, NULL);
		p->kdata = old;
		WRITE_ONCE(p->hooks, old_hooks);
		return -ESHUTDOWN;
	}
	WRITE_ONCE(p->keep_max, fresh->keep_max);
	atomic_set(&p->invalid, 0);
	memset(p->took_ns, 0, sizeof(p->took_ns));
	/* Hooks that still run the old programs do so under RCU. */
	synchronize_rcu();
	pcb_tags_rekeep(p, fresh->hooks);
	pcb_exit_record(&fresh->record, p->name, PAGECACHE_EXIT_REPLACED, 0, PAGECACHE_HOOK_EXIT,
			"replaced", "the policy goes on with other programs");
	if (old->exit)
		old->exit(&fresh->record);
	pcb_exit_push(&fresh->record);
	pcb_hooks_put(old_hooks);
	return 0;
}

/*
 * BPF's link is to hold other programs.  Returns 0, or nothing has changed: -EINVAL (another name),
 * -ESHUTDOWN (the policy has ended by itself: detach it), or why the new programs are refused.
 */
int pcb_update(void *kdata, void *old_kdata, struct bpf_link *link)
{
	struct pcb_policy *p, *fresh;
	int err;

	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	fresh = pcb_policy_alloc(kdata);
	if (!fresh)
		return -ENOMEM;
	mutex_lock(&pcb_mutex);
	p = pcb_policy_of(old_kdata);
	if (WARN_ON_ONCE(!p))
		err = -ENOENT;
	else if (test_bit(PCB_ENDED, &p->ended))
		err = -ESHUTDOWN;
	else if (strcmp(p->name, fresh->name))
		err = -EINVAL;
	else
		err = pcb_policy_start(fresh);
	if (!err) {
		err = pcb_policy_replace(p, fresh);
		if (err)
			pcb_hooks_put(fresh->hooks);
	} else if (fresh->record.kind) {
		pcb_exit_push(&fresh->record);
	}
	mutex_unlock(&pcb_mutex);
	pcb_policy_put(fresh);
	return err;
}
