// SPDX-License-Identifier: GPL-2.0-only
/*
 * hooks_evict.c - the evict hook.
 *
 * Reclaim takes folios off the end of its lists (of the inactive list, or of the oldest generation)
 * and calls folio_referenced() on each as the last thing before it evicts it, with the folio
 * locked.  That call is redirected: by a direct call (direct.c) or, where that cannot be had, by
 * ftrace, as livepatch does it.  A folio said to be referenced twice becomes active, or a member of
 * the youngest generation: it comes back after all others have had their turn.  One said not to be
 * referenced goes.  shrink_active_list() asks, too, with the folio unlocked: that only decides how
 * a list is sorted, and is left alone.
 *
 * A keep is honored within the policy's budget (keep.c) and while reclaim can afford it
 * (fairness.c); otherwise the kernel decides, and it is counted.  What lies below memory.min and
 * memory.low of its cgroup is not looked at by reclaim, so nobody is asked.
 */
#include <linux/cgroup.h>
#include <linux/memcontrol.h>
#include <linux/page_counter.h>
#include <linux/static_call.h>

#include "call.h"
#include "fairness.h"
#include "hooks.h"
#include "hooks_evict.h"
#include "trace.h"

static bool pcb_direct; /* how folio_referenced() is redirected */
bool pcb_evict_possible;

static int pcb_no_referenced(struct folio *folio, int is_locked, struct mem_cgroup *memcg,
			     pcb_vma_flags *vm_flags)
{
	return 0;
}

pcb_check_prototype(folio_referenced, pcb_no_referenced);
DEFINE_STATIC_CALL(pcb_referenced, pcb_no_referenced);

static bool pcb_keep_folio(struct pcb_policy *p, struct pcb_keep *keep, struct folio *folio,
			   struct mem_cgroup *memcg, struct pcb_reclaimer *reclaimer)
{
	unsigned long nr = folio_nr_pages(folio);
	enum pcb_keep_refusal reason;

	if (!pcb_reclaim_affords(reclaimer, folio, memcg)) {
		reason = PCB_KEEP_OVERRULED;
		pcb_count(p, keep_overruled_bytes, (u64)nr << PAGE_SHIFT);
	} else if (!keep || !pcb_keep_add(keep, folio->index, nr)) {
		reason = keep ? PCB_KEEP_OVER_BUDGET : PCB_KEEP_NO_RECORD;
		pcb_count(p, keep_over_budget_bytes, (u64)nr << PAGE_SHIFT);
	} else {
		pcb_reclaim_kept(reclaimer, nr);
		pcb_count(p, kept_bytes, (u64)nr << PAGE_SHIFT);
		return true;
	}
	pcb_count(p, keep_ignored_bytes, (u64)nr << PAGE_SHIFT);
	trace_pagecache_keep_refused(p, folio->mapping, folio->index, nr, reason);
	return false;
}

static void pcb_describe(struct pagecache_ctx *ctx, struct folio *folio, struct mem_cgroup *memcg,
			 struct mem_cgroup *target, struct pcb_keep *keep, int refs, int priority)
{
	ctx->kind = target ? PAGECACHE_KIND_CGROUP : PAGECACHE_KIND_MACHINE;
	ctx->node = folio_nid(folio);
	ctx->priority = priority;
	ctx->cgroup_id = 0;
#ifdef CONFIG_MEMCG
	if (memcg) {
		unsigned long low = READ_ONCE(memcg->memory.elow);

		ctx->cgroup_id = cgroup_id(memcg->css.cgroup);
		if (low && page_counter_read(&memcg->memory) <= low)
			ctx->flags |= PAGECACHE_F_BELOW_LOW;
	}
#endif
	if (refs || folio_test_referenced(folio))
		ctx->flags |= PAGECACHE_F_REFERENCED;
	if (folio_mapped(folio))
		ctx->flags |= PAGECACHE_F_MAPPED;
	if (folio_test_workingset(folio))
		ctx->flags |= PAGECACHE_F_WORKINGSET;
	if (folio_test_dirty(folio))
		ctx->flags |= PAGECACHE_F_DIRTY;
	if (keep && pcb_keep_map_has(&keep->map, folio->index))
		ctx->flags |= PAGECACHE_F_KEPT;
}

/* Asks the policy; returns what reclaim is to be told of references. */
static int pcb_ask_evict(struct folio *folio, struct mem_cgroup *target, int refs)
{
	struct address_space *mapping = folio->mapping; /* the folio is locked */
	unsigned long nr = folio_nr_pages(folio);
	struct pcb_reclaimer *reclaimer;
	struct pcb_governance by;
	struct mem_cgroup *memcg;
	struct pcb_keep *keep;
	struct pcb_call call;
	s32 verdict;

	VM_WARN_ON_ONCE_FOLIO(!folio_test_locked(folio), folio);
	rcu_read_lock();
	by = pcb_governance_of(mapping);
	if (by.tag) {
		pcb_saw(by.tag, PCB_SIGHT_EVICT);
		pcb_tag_sync(&by, mapping);
	}
	/* Another policy may have turned the hook on which this one does without. */
	if (!by.ops || !by.ops->evict || !(READ_ONCE(by.policy->hooks) & BIT(PAGECACHE_HOOK_EVICT)))
		goto out;
	memcg = folio_memcg(folio);
	keep = rcu_dereference(by.tag->keep);
	reclaimer = pcb_reclaimer_of_current(folio, memcg);

	pcb_call_init(&call, &by, PAGECACHE_HOOK_EVICT, mapping, NULL, folio->index, nr);
	pcb_describe(&call.ctx, folio, memcg, target, keep, refs, pcb_reclaim_priority(reclaimer));
	pcb_count(by.policy, evict_calls, 1);
	verdict = by.ops->evict(&call.ctx);
	pcb_policy_took(by.policy, PAGECACHE_HOOK_EVICT, call.ctx.time_ns);

	switch (verdict) {
	case PAGECACHE_EVICT_KEEP:
		if (pcb_keep_folio(by.policy, keep, folio, memcg, reclaimer)) {
			/*
			 * Since v6.14 generations (MGLRU) keep a folio that is neither referenced
			 * nor part of the working set for one round only, and ask again at once.
			 */
			folio_set_referenced(folio);
			refs = 2;
			goto out;
		}
		break;
	case PAGECACHE_EVICT_NOW:
		/* -1: the mappings are being changed and could not be looked at. */
		if (refs >= 0) {
			folio_clear_referenced(folio);
			refs = 0;
		}
		pcb_count(by.policy, evicted_now_bytes, (u64)nr << PAGE_SHIFT);
		break;
	case PAGECACHE_EVICT_DEFAULT:
		break;
	default:
		pcb_policy_invalid(by.policy, PAGECACHE_HOOK_EVICT,
				   "evict: the return value is not a verdict");
	}
	if (keep)
		pcb_keep_del(keep, folio->index, nr);
out:
	rcu_read_unlock();
	return refs;
}

noinline int pcb_folio_referenced(struct folio *folio, int is_locked, struct mem_cgroup *target,
				  pcb_vma_flags *vm_flags)
{
	int refs = static_call(pcb_referenced)(folio, PCB_LOCKED_OURS, target, vm_flags);

	/* Locked by mlock: stays, whatever a policy says. */
	if (!pcb_locked_by_mlock(vm_flags))
		refs = pcb_ask_evict(folio, target, refs);
	percpu_ref_put(&pcb_active);
	return refs;
}

static void notrace pcb_redirect_referenced(unsigned long ip, unsigned long parent_ip,
					    struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct folio *folio = (struct folio *)ftrace_regs_get_argument(fregs, 0);

	if (!pcb_reclaim_asks(folio, ftrace_regs_get_argument(fregs, 1)))
		return;
	/* Our own calls of the original say PCB_LOCKED_OURS: whoever else calls is meant. */
	pcb_unless_recursing(ip, parent_ip) pcb_redirect_anyone(pcb_folio_referenced, fregs);
}

/* As reclaim would ask about a folio that is locked. */
void pcb_evict_try(struct folio *folio)
{
	pcb_vma_flags vm_flags;

	static_call(pcb_referenced)(folio, PCB_LOCKED_RECLAIM, NULL, &vm_flags);
}

static struct pcb_ftrace pcb_evict_redirection = {
	.name = "folio_referenced",
	.prototype = PCB_REFERENCED_PROTOTYPE,
	.ops = { .func = pcb_redirect_referenced, .flags = FTRACE_OPS_FL_IPMODIFY },
};

/* A kernel without it has the other hooks; a policy that needs this one does not attach. */
static int pcb_evict_prepare(void)
{
	if (pcb_fairness_prepare())
		pr_warn("hook evict: no tracepoint mm_vmscan_lru_shrink_inactive\n");
	else if (!pcb_ftrace_prepare(&pcb_evict_redirection, 1))
		pcb_evict_possible = true;
	if (!pcb_evict_possible)
		return 0;
	static_call_update(pcb_referenced, (typeof(&pcb_no_referenced))pcb_evict_redirection.addr);
	/* Without it, it cannot be turned on, and ftrace is left. */
	pcb_direct_prepare(pcb_evict_redirection.addr);
	return 0;
}

static int pcb_redirect_on(void)
{
	pcb_direct = !pcb_direct_on();
	return pcb_direct ? 0 : pcb_ftrace_on(&pcb_evict_redirection, 1);
}

static void pcb_redirect_off(void)
{
	if (pcb_direct)
		pcb_direct_off();
	else
		pcb_ftrace_off(&pcb_evict_redirection, 1);
}

static int pcb_evict_on(const char **failed)
{
	int err;

	if (!pcb_evict_possible) {
		*failed = "evict: this kernel's reclaim cannot be reached";
		return -EOPNOTSUPP;
	}
	err = pcb_fairness_on();
	if (err) {
		*failed = "evict: the tracepoint of reclaim refuses a probe";
		return err;
	}
	err = pcb_redirect_on();
	if (err) {
		pcb_fairness_off();
		*failed =
			err == -EBUSY
				? "evict: folio_referenced is redirected already (by a live patch?)"
				: "evict: ftrace refuses to redirect folio_referenced";
	}
	return err;
}

static void pcb_evict_off(void)
{
	pcb_redirect_off();
	pcb_fairness_off();
}

static void pcb_evict_release(void)
{
	if (!pcb_evict_possible)
		return;
	pcb_ftrace_release(&pcb_evict_redirection, 1);
	pcb_direct_release();
}

struct pcb_hook_family pcb_evict_hooks = {
	.name = "evict",
	.hooks = BIT(PAGECACHE_HOOK_EVICT),
	.prepare = pcb_evict_prepare,
	.on = pcb_evict_on,
	.off = pcb_evict_off,
	.release = pcb_evict_release,
};
