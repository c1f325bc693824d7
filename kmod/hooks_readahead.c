// SPDX-License-Identifier: GPL-2.0-only
/*
 * hooks_readahead.c - the readahead hook.
 *
 * Three functions of mm/readahead.c are redirected with ftrace, as livepatch does it:
 *
 *   page_cache_sync_ra()   read() of an absent page; a fault in a MADV_SEQUENTIAL mapping
 *   page_cache_async_ra()  read() or fault reached a readahead marker
 *   page_cache_ra_order()  read-around of a fault; only when filemap_fault() calls it
 *
 * What the application asks for itself is left alone: readahead(2), fadvise and madvise
 * WILLNEED go through force_page_cache_ra(); FADV_RANDOM and huge-page mappings are passed
 * on; MADV_RANDOM never gets here.  The callback of ftrace only looks for a tag; the rest runs
 * in place of the original, in the reader's context.
 */
#include <linux/ftrace.h>
#include <linux/pagemap.h>
#include <linux/static_call.h>
#include <linux/topology.h>

#include "hooks.h"
#include "placement.h"
#include "prefetch.h"
#include "streams.h"
#include "trace.h"

/* Compilers put what is inlined into a function, and what they think is rare, where they like. */
static struct pcb_code pcb_fault_code[] = {
	{ "filemap_fault" },	       { "filemap_fault.cold" },
	{ "do_sync_mmap_readahead" },  { "do_sync_mmap_readahead.cold" },
	{ "do_async_mmap_readahead" }, { "do_async_mmap_readahead.cold" },
};

/* The code of khugepaged, which reads for no task in particular and is left alone. */
static struct pcb_code pcb_khugepaged_code[] = {
	{ "collapse_file" },
	{ "collapse_file.isra.0" },
	{ "hpage_collapse_scan_file" },
};

static bool notrace pcb_called_by_fault(unsigned long ip)
{
	return pcb_code_has(pcb_fault_code, ARRAY_SIZE(pcb_fault_code), ip);
}

static bool pcb_no_congestion(void)
{
	return false;
}

DEFINE_STATIC_CALL(pcb_congested, pcb_no_congestion);

/* Clamps an answer.  Returns false when it makes no sense at all. */
static bool pcb_take_answer(struct pcb_policy *p, const struct pagecache_ctx *ctx,
			    const struct pagecache_answer *answer, struct pcb_plan *plan)
{
	struct pcb_plan_bounds bounds = {
		.file_pages = ctx->file_pages,
		.max_pages = pcb_mib_to_pages(pcb_max_answer_mib),
		.max_order = MAX_PAGECACHE_ORDER,
		.node_allowed = pcb_node_allowed(answer->node),
	};
	enum pcb_plan_result result = pcb_plan_from(answer, &bounds, plan);

	if (result == PCB_PLAN_CLAMPED)
		pcb_count(p, clamped_answers, 1);
	return result != PCB_PLAN_INVALID;
}

static void pcb_count_question(struct pcb_policy *p, u32 kind, u32 flags)
{
	pcb_count(p, readahead_calls, 1);
	switch (kind) {
	case PAGECACHE_KIND_MISS:
		pcb_count(p, readahead_miss, 1);
		break;
	case PAGECACHE_KIND_FAULT:
	case PAGECACHE_KIND_FAULT_SEQ:
		pcb_count(p, readahead_fault, 1);
		break;
	default:
		pcb_count(p, readahead_marker, 1);
	}
	if (flags & PAGECACHE_F_LATE)
		pcb_count(p, readahead_late, 1);
}

/* What a policy has decided.  @policy: NULL, or a reference. */
struct pcb_decision {
	struct pcb_policy *policy;
	struct pcb_plan plan;
};

/* Whether the reader must not be kept waiting: filemap_get_pages() tells the allocator so. */
static bool pcb_reader_nowait(void)
{
	return current->flags & PF_MEMALLOC_NOIO;
}

static enum pcb_sight pcb_readahead_sight(u32 kind)
{
	return kind == PAGECACHE_KIND_MISS     ? PCB_SIGHT_MISS
	       : kind == PAGECACHE_KIND_MARKER ? PCB_SIGHT_MARKER
	       : kind == PAGECACHE_KIND_FAULT  ? PCB_SIGHT_FAULT
					       : PCB_SIGHT_NONE;
}

/* Asks the policy.  Returns true when it decided. */
static bool pcb_ask(struct readahead_control *ractl, u32 kind, u32 flags, pgoff_t index,
		    unsigned long nr, struct pcb_decision *decision)
{
	struct pagecache_answer answer = {
		.mark = PAGECACHE_NO_MARK,
		.node = PAGECACHE_NODE_ANY,
		.order = PAGECACHE_ORDER_AUTO,
	};
	struct pcb_plan *plan = &decision->plan;
	struct pcb_governance by;
	struct pcb_policy *p;
	struct pcb_call call;
	bool decided = false;
	s32 verdict;

	rcu_read_lock();
	by = pcb_governance_of(ractl->mapping);
	if (by.tag) {
		pcb_saw(by.tag, pcb_readahead_sight(kind));
		pcb_tag_sync(&by, ractl->mapping);
	}
	p = by.policy;
	if (!by.ops || !by.ops->readahead)
		goto out;
	/* The kernel reads around a fault whether there is congestion or not. */
	if (kind != PAGECACHE_KIND_FAULT && static_call(pcb_congested)())
		goto out;

	pcb_call_init(&call, &by, PAGECACHE_HOOK_READAHEAD, ractl->mapping, ractl->file, index, nr);
	call.ctx.kind = kind;
	call.ctx.flags |= flags;
	if (pcb_reader_nowait())
		call.ctx.flags |= PAGECACHE_F_NOWAIT;
	if (pcb_ractl_dropbehind(ractl))
		call.ctx.flags |= PAGECACHE_F_DONTCACHE;
	pcb_count_question(p, kind, flags);
	verdict = by.ops->readahead(&call.ctx, &answer);
	pcb_policy_took(p, PAGECACHE_HOOK_READAHEAD, call.ctx.time_ns);
	if (verdict == PAGECACHE_OVERRIDE) {
		decided = pcb_take_answer(p, &call.ctx, &answer, plan);
		if (!decided)
			pcb_policy_invalid(p, PAGECACHE_HOOK_READAHEAD,
					   "readahead: the answer starts behind the file's end");
	} else if (verdict != PAGECACHE_DEFAULT) {
		pcb_policy_invalid(p, PAGECACHE_HOOK_READAHEAD,
				   "readahead: the return value is not a verdict");
	}
	decided = decided && kref_get_unless_zero(&p->ref);
	if (decided) {
		decision->policy = p;
		plan->dropbehind = pcb_ractl_dropbehind(ractl);
		pcb_count(p, readahead_override, 1);
		pcb_count(p, readahead_bytes, (u64)plan->nr << PAGE_SHIFT);
	} else {
		pcb_count(p, readahead_default, 1);
	}
	trace_pagecache_readahead(&call, decided ? plan : NULL);
out:
	rcu_read_unlock();
	return decided;
}

static void pcb_carry_out(struct readahead_control *ractl, struct pcb_decision *decision)
{
	struct pcb_plan *plan = &decision->plan;
	struct file_ra_state *ra = ractl->ra;
	struct pcb_plan rest = *plan;

	if (plan->nr) {
		/* The kernel's own logic goes on from here if the policy stops deciding. */
		ra->start = plan->start;
		ra->size = plan->nr;
		ra->async_size =
			plan->mark == PAGECACHE_NO_MARK ? 0 : plan->start + plan->nr - plan->mark;
		/* As much as the kernel would; a worker does the rest. */
		if (pcb_reader_nowait())
			plan->nr = min_t(unsigned long, plan->nr, ra->ra_pages);
		rest.start += plan->nr;
		rest.nr -= plan->nr;
		if (plan->node == PAGECACHE_NODE_ANY || plan->node == numa_node_id() ||
		    !pcb_read_on_node(decision->policy, ractl->file, plan))
			pcb_read_here(ractl->file, ractl->mapping, plan);
		if (rest.nr)
			pcb_read_later(decision->policy, ractl->file, &rest);
	}
	pcb_policy_put(decision->policy);
}

static void pcb_sync(struct readahead_control *ractl, unsigned long req_count, u32 kind)
{
	struct pcb_decision decision;

	if (pcb_ask(ractl, kind, 0, readahead_index(ractl), req_count, &decision))
		pcb_carry_out(ractl, &decision);
	else
		page_cache_sync_ra(ractl, req_count);
	percpu_ref_put(&pcb_active);
}

static noinline void pcb_sync_ra(struct readahead_control *ractl, unsigned long req_count)
{
	pcb_sync(ractl, req_count, PAGECACHE_KIND_MISS);
}

static noinline void pcb_sync_ra_fault(struct readahead_control *ractl, unsigned long req_count)
{
	pcb_sync(ractl, req_count, PAGECACHE_KIND_FAULT_SEQ);
}

static void pcb_async(struct readahead_control *ractl, struct folio *folio, unsigned long req_count,
		      u32 kind)
{
	u32 flags = folio_test_uptodate(folio) ? 0 : PAGECACHE_F_LATE;
	struct pcb_decision decision;

	/* PG_readahead and PG_reclaim are one bit: only the former on a folio that is clean. */
	if (!folio_test_writeback(folio) &&
	    pcb_ask(ractl, kind, flags, readahead_index(ractl), req_count, &decision)) {
		folio_clear_readahead(folio);
		pcb_carry_out(ractl, &decision);
	} else {
		page_cache_async_ra(ractl, folio, req_count);
	}
	percpu_ref_put(&pcb_active);
}

static noinline void pcb_async_ra(struct readahead_control *ractl, struct folio *folio,
				  unsigned long req_count)
{
	pcb_async(ractl, folio, req_count, PAGECACHE_KIND_MARKER);
}

static noinline void pcb_async_ra_fault(struct readahead_control *ractl, struct folio *folio,
					unsigned long req_count)
{
	pcb_async(ractl, folio, req_count, PAGECACHE_KIND_FAULT_MARKER);
}

pcb_check_prototype(page_cache_sync_ra, pcb_sync_ra);
pcb_check_prototype(page_cache_async_ra, pcb_async_ra);

/*
 * Read-around, and nothing else that do_sync_mmap_readahead() asks for: a mapping with
 * MADV_HUGEPAGE wants two huge folios, newer kernels read executable code in a way of its own.
 */
static bool pcb_is_read_around(struct readahead_control *ractl, const struct file_ra_state *ra)
{
	return readahead_index(ractl) == ra->start && ra->size == ra->ra_pages &&
	       ra->async_size == ra->ra_pages / 4;
}

/* do_sync_mmap_readahead() has moved the index to the start of its window around the fault. */
static pgoff_t pcb_fault_index(const struct file_ra_state *ra)
{
	return ra->start ? ra->start + ra->ra_pages / 2 : 0;
}

static noinline void pcb_ra_order_fault(PCB_RA_ORDER_ARGS)
{
	struct pcb_decision decision;

	if (pcb_is_read_around(ractl, ra) &&
	    pcb_ask(ractl, PAGECACHE_KIND_FAULT, 0, pcb_fault_index(ra), 1, &decision))
		pcb_carry_out(ractl, &decision);
	else
		pcb_ra_order_original(PCB_RA_ORDER_NAMES);
	percpu_ref_put(&pcb_active);
}

static __always_inline bool pcb_governed(struct readahead_control *ractl)
{
	struct file *file = ractl->file;
	bool governed;

	if (!file || (file->f_mode & FMODE_RANDOM) || !ractl->ra->ra_pages)
		return false;
	rcu_read_lock();
	governed = pcb_tag_find(ractl->mapping->host);
	rcu_read_unlock();
	return governed;
}

static __always_inline void pcb_redirect_governed(void *ours, unsigned long ip,
						  unsigned long parent_ip,
						  struct ftrace_regs *fregs)
{
	struct readahead_control *ractl =
		(struct readahead_control *)ftrace_regs_get_argument(fregs, 0);

	pcb_unless_recursing(ip, parent_ip)
	{
		if (pcb_governed(ractl))
			pcb_redirect_to(ours, parent_ip, fregs);
	}
}

static void notrace pcb_redirect_sync(unsigned long ip, unsigned long parent_ip,
				      struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	if (!pcb_code_has(pcb_khugepaged_code, ARRAY_SIZE(pcb_khugepaged_code), parent_ip))
		pcb_redirect_governed(pcb_called_by_fault(parent_ip) ? pcb_sync_ra_fault
								     : pcb_sync_ra,
				      ip, parent_ip, fregs);
}

static void notrace pcb_redirect_async(unsigned long ip, unsigned long parent_ip,
				       struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	pcb_redirect_governed(pcb_called_by_fault(parent_ip) ? pcb_async_ra_fault : pcb_async_ra,
			      ip, parent_ip, fregs);
}

static void notrace pcb_redirect_order(unsigned long ip, unsigned long parent_ip,
				       struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	if (pcb_called_by_fault(parent_ip))
		pcb_redirect_governed(pcb_ra_order_fault, ip, parent_ip, fregs);
}

static struct pcb_ftrace pcb_redirections[] = {
	PCB_REDIRECT("page_cache_ra_order", PCB_RA_ORDER_PROTOTYPE, pcb_redirect_order, NULL),
	PCB_REDIRECT("page_cache_sync_ra", "void(readahead_control *, int64)", pcb_redirect_sync,
		     NULL),
	PCB_REDIRECT("page_cache_async_ra", "void(readahead_control *, folio *, int64)",
		     pcb_redirect_async, NULL),
};

static int pcb_readahead_prepare(void)
{
	unsigned long congested = pcb_symbol("blk_cgroup_congested");

	if (!pcb_code_find(pcb_fault_code, ARRAY_SIZE(pcb_fault_code)))
		return -ENOENT;
	pcb_code_find(pcb_khugepaged_code, ARRAY_SIZE(pcb_khugepaged_code));
	/* Where groups of processes share a device by cgroups: not to be read ahead for now. */
	if (congested)
		static_call_update(pcb_congested, (typeof(&pcb_no_congestion))congested);
	return pcb_ftrace_prepare(pcb_redirections, ARRAY_SIZE(pcb_redirections));
}

static int pcb_readahead_on(const char **failed)
{
	int err = pcb_ftrace_on(pcb_redirections, ARRAY_SIZE(pcb_redirections));

	if (err == -EBUSY)
		*failed = "readahead: a function is redirected already (by a live patch?)";
	else if (err)
		*failed = "readahead: ftrace refuses to redirect the kernel's functions";
	return err;
}

static void pcb_readahead_off(void)
{
	pcb_ftrace_off(pcb_redirections, ARRAY_SIZE(pcb_redirections));
}

static void pcb_readahead_release(void)
{
	pcb_ftrace_release(pcb_redirections, ARRAY_SIZE(pcb_redirections));
}

struct pcb_hook_family pcb_readahead_hooks = {
	.name = "readahead",
	.hooks = BIT(PAGECACHE_HOOK_READAHEAD),
	.prepare = pcb_readahead_prepare,
	.on = pcb_readahead_on,
	.off = pcb_readahead_off,
	.release = pcb_readahead_release,
};
