// SPDX-License-Identifier: GPL-2.0-only
/*
 * hooks_cache.c - the hooks added and removed, and the exact count of resident pages.
 *
 * The tracepoints are not exported by name, but the list of all tracepoints is.  removed
 * runs with the page-cache lock held and interrupts off.
 */
#include <linux/pagemap.h>
#include <linux/tracepoint.h>

#include "pagecache.h"

static struct tracepoint *pcb_tp_added, *pcb_tp_removed;

static void pcb_folio_moved(struct folio *folio, enum pagecache_hook hook)
{
	struct address_space *mapping = folio->mapping;
	long nr = folio_nr_pages(folio);
	struct pagecache_ops *ops;
	struct pcb_policy *p;
	struct pcb_kept *kept;
	struct pcb_call call;
	struct pcb_tag *tag;
	bool added = hook == PAGECACHE_HOOK_ADDED;

	if (!mapping || !mapping->host)
		return;
	rcu_read_lock();
	tag = pcb_tag_find(mapping->host);
	if (!tag)
		goto out;
	atomic64_add(added ? nr : -nr, &tag->resident);
	p = rcu_dereference(tag->policy);
	if (!p)
		goto out;
	if (added) {
		if (READ_ONCE(pcb_pressure_live))
			pcb_pressure_added(p, tag, folio);
	} else {
		kept = rcu_dereference(tag->kept);
		if (kept)
			pcb_kept_del(kept, folio->index, nr);
	}
	atomic64_add(added ? nr : -nr, &p->governed);
	if (added)
		pcb_count(p, added_bytes, (u64)nr << PAGE_SHIFT);
	else
		pcb_count(p, removed_bytes, (u64)nr << PAGE_SHIFT);
	ops = rcu_dereference(p->ops);
	if (!ops || !(added ? ops->added : ops->removed))
		goto out;
	pcb_call_init(&call, p, tag, hook, mapping, NULL, folio->index, nr);
	if (added)
		ops->added(&call.ctx);
	else
		ops->removed(&call.ctx);
out:
	rcu_read_unlock();
}

static void pcb_on_added(void *data, struct folio *folio)
{
	pcb_folio_moved(folio, PAGECACHE_HOOK_ADDED);
}

static void pcb_on_removed(void *data, struct folio *folio)
{
	pcb_folio_moved(folio, PAGECACHE_HOOK_REMOVED);
}

static void pcb_match_tracepoint(struct tracepoint *tp, void *data)
{
	if (!strcmp(tp->name, "mm_filemap_add_to_page_cache"))
		pcb_tp_added = tp;
	else if (!strcmp(tp->name, "mm_filemap_delete_from_page_cache"))
		pcb_tp_removed = tp;
}

static int pcb_cache_prepare(void)
{
	for_each_kernel_tracepoint(pcb_match_tracepoint, NULL);
	return pcb_tp_added && pcb_tp_removed ? 0 : -ENOENT;
}

static int pcb_cache_on(const char **failed)
{
	int err;

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
	.prepare = pcb_cache_prepare,
	.on = pcb_cache_on,
	.off = pcb_cache_off,
	.release = pcb_cache_release,
};
