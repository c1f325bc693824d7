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
 * A fair fight.  A keep is honoured
 *  - within the policy's budget (keep.c);
 *  - while reclaim gets on: for each page it gets it may be told to keep PCB_KEEPS_PER_PAGE others.
 *    What it has been told beyond that is a debt of the list; a list may owe as many pages as it
 *    has file pages, so that those kept are passed over once, wherever they lie.  The debt is
 *    forgiven with time, too.
 *  - but one in PCB_TITHE, the first among them, not in the last rounds of a reclaim that has gone
 *    all over the lists for nothing.  A failed reclaim may end in memory.low of others being taken,
 *    in an OOM kill, or in kswapd giving up; one that got a single page is tried again.
 * Otherwise the kernel decides, and it is counted.  What lies below memory.min and memory.low of
 * its cgroup is not looked at by reclaim, so nobody is asked.
 */
#include <linux/cgroup.h>
#include <linux/hash.h>
#include <linux/jiffies.h>
#include <linux/memcontrol.h>
#include <linux/mmzone.h>
#include <linux/page_counter.h>
#include <linux/static_call.h>
#include <linux/timekeeping.h>
#include <linux/tracepoint.h>

#include "compat.h"
#include "pagecache.h"

#define PCB_KEEPS_PER_PAGE 4
#define PCB_SMALL_DEBT 1024 /* pages that any list may owe */
#define PCB_LAST_ROUNDS 1 /* priorities */
#define PCB_TITHE 64
#define PCB_FORGIVE (2 * HZ) /* a debt halves in that time */
#define PCB_FIRST_ROUND 12 /* DEF_PRIORITY of mm/internal.h */

/* What a list of the kernel (of one cgroup and node) owes.  Lists may share one. */
struct pcb_debt {
	atomic_long_t pages;
	unsigned long since;
};

/*
 * What is known of a task that reclaims.  Tasks that share one disturb each other for a batch of
 * folios; the debt does not depend on that.
 */
struct pcb_reclaimer {
	struct pcb_debt *last;
	int priority; /* of its last batch */
	unsigned int late; /* keeps wanted in the last rounds */
};

static struct pcb_debt pcb_debts[1 << 8];
static struct pcb_reclaimer pcb_reclaimers[1 << 9];
static struct tracepoint *pcb_tp_shrunk;
static bool pcb_direct; /* how folio_referenced() is redirected */
bool pcb_evict_possible;

static int pcb_no_referenced(struct folio *folio, int is_locked, struct mem_cgroup *memcg,
			     unsigned long *vm_flags)
{
	return 0;
}

DEFINE_STATIC_CALL(pcb_referenced, pcb_no_referenced);

static struct pcb_reclaimer *pcb_reclaimer(void)
{
	return &pcb_reclaimers[hash_ptr(current, 9)];
}

static long pcb_debt_of(struct pcb_debt *debt)
{
	long pages = atomic_long_read(&debt->pages);
	unsigned long since = READ_ONCE(debt->since);

	if (pages <= 0 || time_before(jiffies, since + PCB_FORGIVE))
		return pages;
	/* Whoever is second in this race is told the old number, or takes off half of what is left.
	 */
	WRITE_ONCE(debt->since, jiffies);
	if (time_after(jiffies, since + 16 * PCB_FORGIVE))
		atomic_long_set(&debt->pages, 0);
	else
		atomic_long_sub(pages / 2, &debt->pages);
	return pages / 2;
}

/* A batch of folios has been tried.  In the task that reclaims. */
static void pcb_on_shrunk(void *data, int nid, unsigned long scanned, unsigned long reclaimed,
			  struct reclaim_stat *stat, int priority, int file)
{
	struct pcb_reclaimer *r = pcb_reclaimer();
	struct pcb_debt *debt = READ_ONCE(r->last);

	WRITE_ONCE(r->priority, priority);
	if (priority > PCB_LAST_ROUNDS)
		WRITE_ONCE(r->late, 0);
	if (!debt || !reclaimed || atomic_long_read(&debt->pages) <= 0)
		return;
	if (atomic_long_sub_return(reclaimed * PCB_KEEPS_PER_PAGE, &debt->pages) < 0)
		atomic_long_set(&debt->pages, 0);
}

/*
 * File pages on the lists that this folio comes from.  The kernel's own sum is not exported; each
 * of the two kinds of lists counts for itself, and is empty while the other is in use.
 */
static long pcb_list_pages(struct folio *folio, struct mem_cgroup *memcg)
{
	struct pglist_data *node = NODE_DATA(folio_nid(folio));
	long pages = 0;

#ifdef CONFIG_MEMCG
	if (memcg) {
		struct mem_cgroup_per_node *mz = memcg->nodeinfo[folio_nid(folio)];

		for (int zone = 0; zone < MAX_NR_ZONES; zone++) {
			pages += READ_ONCE(mz->lru_zone_size[zone][LRU_INACTIVE_FILE]) +
				 READ_ONCE(mz->lru_zone_size[zone][LRU_ACTIVE_FILE]);
#ifdef CONFIG_LRU_GEN
			for (int gen = 0; gen < MAX_NR_GENS; gen++)
				pages += READ_ONCE(
					mz->lruvec.lrugen.nr_pages[gen][LRU_GEN_FILE][zone]);
#endif
		}
		return pages;
	}
#endif
	return atomic_long_read(&node->vm_stat[NR_INACTIVE_FILE]) +
	       atomic_long_read(&node->vm_stat[NR_ACTIVE_FILE]);
}

/* Whether reclaim can afford to keep this folio. */
static bool pcb_affordable(struct folio *folio, struct mem_cgroup *memcg, struct pcb_reclaimer *r,
			   struct pcb_debt *debt, int priority)
{
	long owed = pcb_debt_of(debt);

	if (priority <= PCB_LAST_ROUNDS && r->late++ % PCB_TITHE == 0)
		return false;
	return owed < PCB_SMALL_DEBT || owed < pcb_list_pages(folio, memcg);
}

static bool pcb_keep(struct pcb_policy *p, struct pcb_kept *kept, struct folio *folio,
		     struct mem_cgroup *memcg, struct pcb_reclaimer *r, int priority)
{
	unsigned long nr = folio_nr_pages(folio);
	struct pcb_debt *debt = READ_ONCE(r->last);

	if (!pcb_affordable(folio, memcg, r, debt, priority)) {
		pcb_count(p, keep_overruled_bytes, (u64)nr << PAGE_SHIFT);
	} else if (!kept || !pcb_kept_add(kept, folio->index, nr)) {
		pcb_count(p, keep_over_budget_bytes, (u64)nr << PAGE_SHIFT);
	} else {
		if (!atomic_long_read(&debt->pages))
			WRITE_ONCE(debt->since, jiffies);
		atomic_long_add(nr, &debt->pages);
		pcb_count(p, kept_bytes, (u64)nr << PAGE_SHIFT);
		return true;
	}
	pcb_count(p, keep_ignored_bytes, (u64)nr << PAGE_SHIFT);
	return false;
}

static void pcb_describe(struct pagecache_ctx *ctx, struct folio *folio, struct mem_cgroup *memcg,
			 struct mem_cgroup *target, struct pcb_kept *kept, int refs, int priority)
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
	if (kept && pcb_kept_has(kept, folio->index))
		ctx->flags |= PAGECACHE_F_KEPT;
}

/* Asks the policy; returns what reclaim is to be told of references. */
static int pcb_ask_evict(struct folio *folio, struct mem_cgroup *target, int refs)
{
	struct address_space *mapping = folio->mapping; /* the folio is locked */
	struct pcb_reclaimer *r = pcb_reclaimer();
	int priority = READ_ONCE(r->priority);
	unsigned long nr = folio_nr_pages(folio);
	struct pagecache_ops *ops = NULL;
	struct pcb_policy *p = NULL;
	struct mem_cgroup *memcg;
	struct pcb_kept *kept;
	struct pcb_call call;
	struct pcb_tag *tag;
	s32 verdict;

	rcu_read_lock();
	tag = pcb_tag_find(mapping->host);
	if (tag)
		p = rcu_dereference(tag->policy);
	if (p)
		ops = rcu_dereference(p->ops);
	if (!ops || !ops->evict)
		goto out;
	memcg = folio_memcg(folio);
	kept = rcu_dereference(tag->kept);
	WRITE_ONCE(r->last, &pcb_debts[hash_long((unsigned long)memcg + folio_nid(folio), 8)]);

	pcb_call_init(&call, p, tag, PAGECACHE_HOOK_EVICT, mapping, NULL, folio->index, nr);
	pcb_describe(&call.ctx, folio, memcg, target, kept, refs, priority);
	pcb_count(p, evict_calls, 1);
	verdict = ops->evict(&call.ctx);
	pcb_policy_took(p, PAGECACHE_HOOK_EVICT, call.ctx.time_ns);

	switch (verdict) {
	case PAGECACHE_EVICT_KEEP:
		if (pcb_keep(p, kept, folio, memcg, r, priority)) {
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
		pcb_count(p, evicted_now_bytes, (u64)nr << PAGE_SHIFT);
		break;
	case PAGECACHE_EVICT_DEFAULT:
		break;
	default:
		pcb_policy_invalid(p, PAGECACHE_HOOK_EVICT,
				   "evict: the return value is not a verdict");
	}
	if (kept)
		pcb_kept_del(kept, folio->index, nr);
out:
	rcu_read_unlock();
	return refs;
}

noinline int pcb_folio_referenced(struct folio *folio, int is_locked, struct mem_cgroup *target,
				  unsigned long *vm_flags)
{
	int refs = static_call(pcb_referenced)(folio, PCB_LOCKED_OURS, target, vm_flags);

	/* Locked by mlock: stays, whatever a policy says. */
	if (!(*vm_flags & VM_LOCKED))
		refs = pcb_ask_evict(folio, target, refs);
	percpu_ref_put(&pcb_active);
	return refs;
}

static void notrace pcb_redirect_referenced(unsigned long ip, unsigned long parent_ip,
					    struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct folio *folio = (struct folio *)ftrace_regs_get_argument(fregs, 0);
	int bit;

	if (!pcb_reclaim_asks(folio, ftrace_regs_get_argument(fregs, 1)))
		return;
	bit = ftrace_test_recursion_trylock(ip, parent_ip);
	if (bit < 0)
		return;
	if (percpu_ref_tryget_live(&pcb_active))
		ftrace_regs_set_instruction_pointer(fregs, (unsigned long)pcb_folio_referenced);
	ftrace_test_recursion_unlock(bit);
}

static struct pcb_ftrace pcb_evict_redirection = {
	.name = "folio_referenced",
	.ops = { .func = pcb_redirect_referenced, .flags = FTRACE_OPS_FL_IPMODIFY },
};

static void pcb_match_shrunk(struct tracepoint *tp, void *data)
{
	if (!strcmp(tp->name, "mm_vmscan_lru_shrink_inactive"))
		pcb_tp_shrunk = tp;
}

/* A kernel without it has the other hooks; a policy with this one does not attach. */
static int pcb_evict_prepare(void)
{
	for_each_kernel_tracepoint(pcb_match_shrunk, NULL);
	if (!pcb_tp_shrunk)
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
	int i, err;

	if (!pcb_evict_possible) {
		*failed = "evict: this kernel's reclaim cannot be reached";
		return -EOPNOTSUPP;
	}
	for (i = 0; i < ARRAY_SIZE(pcb_reclaimers); i++)
		pcb_reclaimers[i] = (struct pcb_reclaimer){ .priority = PCB_FIRST_ROUND };
	for (i = 0; i < ARRAY_SIZE(pcb_debts); i++)
		atomic_long_set(&pcb_debts[i].pages, 0);
	err = tracepoint_probe_register(pcb_tp_shrunk, pcb_on_shrunk, NULL);
	if (err) {
		*failed = "evict: the tracepoint of reclaim refuses a probe";
		return err;
	}
	err = pcb_redirect_on();
	if (err) {
		tracepoint_probe_unregister(pcb_tp_shrunk, pcb_on_shrunk, NULL);
		tracepoint_synchronize_unregister();
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
	tracepoint_probe_unregister(pcb_tp_shrunk, pcb_on_shrunk, NULL);
	tracepoint_synchronize_unregister();
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
