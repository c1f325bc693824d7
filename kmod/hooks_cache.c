// SPDX-License-Identifier: GPL-2.0-only
/*
 * hooks_cache.c - the hooks added and removed, and the exact count of resident pages.
 *
 * removed runs with the page-cache lock held and interrupts off.
 */
#include <linux/pagemap.h>
#include <linux/tracepoint.h>

#include "call.h"
#include "hooks.h"
#include "hooks_pressure.h"

static struct tracepoint *pcb_tp_added, *pcb_tp_removed;

static noinline void pcb_folio_added_or_removed(struct folio *folio, enum pagecache_hook hook)
{
	struct address_space *mapping = folio->mapping;
	long nr = folio_nr_pages(folio);
	bool added = hook == PAGECACHE_HOOK_ADDED;
	struct pcb_governance by;
	struct pcb_policy *p;
	struct pcb_keep *keep;
	struct pcb_call call;
	long change;

	VM_WARN_ON_ONCE_FOLIO(!folio_test_locked(folio), folio);
	if (!added)
		lockdep_assert_held(&mapping->i_pages.xa_lock);
	rcu_read_lock();
	by = pcb_governance_of(mapping);
	if (!by.tag)
		goto out;
	pcb_saw(by.tag, added ? PCB_SIGHT_ADDED : PCB_SIGHT_REMOVED);
	/*
	 * The mapping's own count includes this folio: the tracepoints fire after it has come, and
	 * before it goes.
	 */
	change = added ? nr : -nr;
	if (pcb_tag_sync(&by, mapping) && added)
		change = 0;
	atomic64_add(change, &by.tag->resident);
	p = by.policy;
	if (!p)
		goto out;
	if (added) {
		if (READ_ONCE(pcb_pressure_live))
			pcb_pressure_added(by.tag, folio);
	} else {
		keep = rcu_dereference(by.tag->keep);
		if (keep)
			pcb_keep_del(keep, folio->index, nr);
	}
	atomic64_add(change, &p->governed);
	if (added)
		pcb_count(p, added_bytes, (u64)nr << PAGE_SHIFT);
	else
		pcb_count(p, removed_bytes, (u64)nr << PAGE_SHIFT);
	if (!by.ops || !(added ? by.ops->added : by.ops->removed))
		goto out;
	pcb_call_init(&call, &by, hook, mapping, NULL, folio->index, nr);
	if (added)
		by.ops->added(&call.ctx);
	else
		by.ops->removed(&call.ctx);
	pcb_policy_took(p, hook, call.ctx.time_ns);
out:
	rcu_read_unlock();
}

static __always_inline bool pcb_folio_possible(const struct folio *folio)
{
	const struct address_space *mapping = folio->mapping;

	return mapping && mapping->host && pcb_tag_possible(mapping->host);
}

static void pcb_on_added(void *data, struct folio *folio)
{
	if (pcb_folio_possible(folio))
		pcb_folio_added_or_removed(folio, PAGECACHE_HOOK_ADDED);
}

static void pcb_on_removed(void *data, struct folio *folio)
{
	if (pcb_folio_possible(folio))
		pcb_folio_added_or_removed(folio, PAGECACHE_HOOK_REMOVED);
}

static int pcb_cache_prepare(void)
{
	pcb_tp_added = pcb_tracepoint("mm_filemap_add_to_page_cache", "void(pointer, folio *)");
	pcb_tp_removed =
		pcb_tracepoint("mm_filemap_delete_from_page_cache", "void(pointer, folio *)");
	return pcb_tp_added && pcb_tp_removed ? 0 : -ENOENT;
}

static int pcb_cache_on(const char **failed)
{
	int err;

	/* Pages that came and went while the hooks were off have not been counted. */
	pcb_tags_unsync();
	err = tracepoint_probe_register(pcb_tp_added, pcb_on_added, NULL);
	if (!err) {
		err = tracepoint_probe_register(pcb_tp_removed, pcb_on_removed, NULL);
		if (err)
			tracepoint_probe_unregister(pcb_tp_added, pcb_on_added, NULL);
	}
	if (err)
		*failed = "added and removed: the tracepoints refuse a probe";
	return err;
}

static void pcb_cache_off(void)
{
	tracepoint_probe_unregister(pcb_tp_removed, pcb_on_removed, NULL);
	tracepoint_probe_unregister(pcb_tp_added, pcb_on_added, NULL);
	tracepoint_synchronize_unregister();
}

static void pcb_cache_release(void)
{
}

struct pcb_hook_family pcb_cache_hooks = {
	.name = "added and removed",
	.hooks = PCB_ANY_HOOK,
	.prepare = pcb_cache_prepare,
	.on = pcb_cache_on,
	.off = pcb_cache_off,
	.release = pcb_cache_release,
};
