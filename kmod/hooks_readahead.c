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
#include <linux/topology.h>

#include "hooks.h"
#include "prefetch.h"
#include "streams.h"

static unsigned long pcb_fault_start, pcb_fault_end;

static bool pcb_called_by_fault(unsigned long ip)
{
	return ip >= pcb_fault_start && ip < pcb_fault_end;
}

/* Clamps an answer.  Returns false when it makes no sense at all. */
static bool pcb_take_answer(struct pcb_policy *p, const struct pagecache_ctx *ctx,
			    const struct pagecache_answer *answer, struct pcb_plan *plan)
{
	struct pcb_plan_bounds bounds = {
		.file_pages = ctx->file_pages,
		.max_pages = pcb_mib_to_pages(pcb_max_answer_mib),
		.max_order = MAX_PAGECACHE_ORDER,
		.node_known = pcb_node_known(answer->node),
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

/*
 * Asks the policy.  Returns true when it decided; then *plan says what to do, and *out_policy
 * holds a reference if the plan goes to another node.
 */
static bool pcb_ask(struct file *file, struct address_space *mapping, u32 kind, u32 flags,
		    pgoff_t index, unsigned long nr, struct pcb_plan *plan,
		    struct pcb_policy **out_policy)
{
	struct pagecache_answer answer = {
		.mark = PAGECACHE_NO_MARK,
		.node = PAGECACHE_NODE_ANY,
		.order = PAGECACHE_ORDER_AUTO,
	};
	struct pcb_governance by;
	struct pcb_policy *p;
	struct pcb_call call;
	bool decided = false;
	s32 verdict;

	rcu_read_lock();
	by = pcb_governance_of(mapping);
	p = by.policy;
	if (!by.ops || !by.ops->readahead)
		goto out;

	pcb_call_init(&call, &by, PAGECACHE_HOOK_READAHEAD, mapping, file, index, nr);
	call.ctx.kind = kind;
	call.ctx.flags |= flags;
	pcb_count_question(p, kind, flags);
	verdict = by.ops->readahead(&call.ctx, &answer);
	if (verdict == PAGECACHE_OVERRIDE) {
		decided = pcb_take_answer(p, &call.ctx, &answer, plan);
		if (!decided)
			pcb_policy_invalid(p, PAGECACHE_HOOK_READAHEAD,
					   "readahead: the answer starts behind the file's end");
	} else if (verdict != PAGECACHE_DEFAULT) {
		pcb_policy_invalid(p, PAGECACHE_HOOK_READAHEAD,
				   "readahead: the return value is not a verdict");
	}
	if (decided) {
		pcb_count(p, readahead_override, 1);
		pcb_count(p, readahead_bytes, (u64)plan->nr << PAGE_SHIFT);
		if (plan->node != PAGECACHE_NODE_ANY && plan->node != numa_node_id() &&
		    kref_get_unless_zero(&p->ref))
			*out_policy = p;
	} else {
		pcb_count(p, readahead_default, 1);
	}
out:
	rcu_read_unlock();
	return decided;
}

static void pcb_carry_out(struct readahead_control *ractl, const struct pcb_plan *plan,
			  struct pcb_policy *p)
{
	struct file *file = ractl->file;

	if (plan->nr) {
		/* The kernel's own logic goes on from here if the policy stops deciding. */
		ractl->ra->start = plan->start;
		ractl->ra->size = plan->nr;
		ractl->ra->async_size =
			plan->mark == PAGECACHE_NO_MARK ? 0 : plan->start + plan->nr - plan->mark;
		if (p)
			pcb_read_on_node(p, file, plan);
		else
			pcb_read_here(file, ractl->mapping, plan);
	}
	if (p)
		pcb_policy_put(p);
}

static noinline void pcb_sync_ra(struct readahead_control *ractl, unsigned long req_count)
{
	bool fault = pcb_called_by_fault((unsigned long)__builtin_return_address(0));
	struct pcb_policy *p = NULL;
	struct pcb_plan plan;

	if (pcb_ask(ractl->file, ractl->mapping,
		    fault ? PAGECACHE_KIND_FAULT_SEQ : PAGECACHE_KIND_MISS, 0,
		    readahead_index(ractl), req_count, &plan, &p))
		pcb_carry_out(ractl, &plan, p);
	else
		page_cache_sync_ra(ractl, req_count);
	percpu_ref_put(&pcb_active);
}

static noinline void pcb_async_ra(struct readahead_control *ractl, struct folio *folio,
				  unsigned long req_count)
{
	bool fault = pcb_called_by_fault((unsigned long)__builtin_return_address(0));
	u32 flags = folio_test_uptodate(folio) ? 0 : PAGECACHE_F_LATE;
	struct pcb_policy *p = NULL;
	struct pcb_plan plan;

	/* PG_readahead and PG_reclaim are one bit: only the former on a folio that is clean. */
	if (!folio_test_writeback(folio) &&
	    pcb_ask(ractl->file, ractl->mapping,
		    fault ? PAGECACHE_KIND_FAULT_MARKER : PAGECACHE_KIND_MARKER, flags,
		    readahead_index(ractl), req_count, &plan, &p)) {
		folio_clear_readahead(folio);
		pcb_carry_out(ractl, &plan, p);
	} else {
		page_cache_async_ra(ractl, folio, req_count);
	}
	percpu_ref_put(&pcb_active);
}

/* do_sync_mmap_readahead() has moved the index to the start of its window around the fault. */
static pgoff_t pcb_fault_index(const struct file_ra_state *ra)
{
	return ra->start ? ra->start + ra->ra_pages / 2 : 0;
}

static noinline void pcb_ra_order_fault(PCB_RA_ORDER_ARGS)
{
	struct file *file = ractl->file;
	struct pcb_policy *p = NULL;
	struct pcb_plan plan;
	bool decided = false;

	/* A mapping with MADV_HUGEPAGE asks for two huge folios: the application's own wish. */
	if (ra->size <= ra->ra_pages)
		decided = pcb_ask(file, ractl->mapping, PAGECACHE_KIND_FAULT, 0,
				  pcb_fault_index(ra), 1, &plan, &p);
	if (decided)
		pcb_carry_out(ractl, &plan, p);
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

static void notrace pcb_redirect(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
				 struct ftrace_regs *fregs)
{
	struct readahead_control *ractl =
		(struct readahead_control *)ftrace_regs_get_argument(fregs, 0);

	pcb_unless_recursing(ip, parent_ip)
	{
		if (pcb_governed(ractl))
			pcb_redirect_to(ops->private, parent_ip, fregs);
	}
}

static void notrace pcb_redirect_fault(unsigned long ip, unsigned long parent_ip,
				       struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	if (pcb_called_by_fault(parent_ip))
		pcb_redirect(ip, parent_ip, ops, fregs);
}

#define PCB_REDIRECT(function, callback, ours)                                                \
	{                                                                                     \
		.name = function,                                                             \
		.ops = { .func = callback, .private = ours, .flags = FTRACE_OPS_FL_IPMODIFY } \
	}

static struct pcb_ftrace pcb_redirections[] = {
	PCB_REDIRECT("page_cache_ra_order", pcb_redirect_fault, pcb_ra_order_fault),
	PCB_REDIRECT("page_cache_sync_ra", pcb_redirect, pcb_sync_ra),
	PCB_REDIRECT("page_cache_async_ra", pcb_redirect, pcb_async_ra),
};

static int pcb_readahead_prepare(void)
{
	if (!pcb_symbol_range("filemap_fault", &pcb_fault_start, &pcb_fault_end))
		return -ENOENT;
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
