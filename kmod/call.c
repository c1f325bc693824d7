// SPDX-License-Identifier: GPL-2.0-only
/* call.c - fills in what a hook tells its policy. */
#include <linux/backing-dev.h>
#include <linux/cgroup.h>
#include <linux/kdev_t.h>
#include <linux/memcontrol.h>
#include <linux/once.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <linux/timekeeping.h>
#include <linux/topology.h>

#include "call.h"

/* Hides the address of the open file; never changes, so that the id is stable. */
static unsigned long pcb_file_id_key(void)
{
	static unsigned long key __read_mostly;

	get_random_once(&key, sizeof(key));
	return key | 1; /* files are aligned: the id is never 0 */
}

/*
 * Which memory cgroup is charged for what the current task reads, and, of a reader, what that may
 * hold: reclaim asks for each folio, and has no use for it.
 */
static void pcb_describe_cgroup(struct pagecache_ctx *ctx, bool reader)
{
#ifdef CONFIG_MEMCG
	struct mem_cgroup *memcg = mem_cgroup_from_task(current);
	unsigned long bound = U32_MAX;

	ctx->cgroup_id = memcg ? cgroup_id(memcg->css.cgroup) : 0;
	if (!reader)
		return;
	for (; memcg; memcg = parent_mem_cgroup(memcg))
		bound = min3(bound, READ_ONCE(memcg->memory.max), READ_ONCE(memcg->memory.high));
	ctx->cgroup_pages = bound < U32_MAX ? max(bound, 1UL) : 0;
#endif
}

/* Under rcu_read_lock(). */
void pcb_call_init(struct pcb_call *call, const struct pcb_governance *by, enum pagecache_hook hook,
		   struct address_space *mapping, struct file *file, pgoff_t index,
		   unsigned long nr)
{
	const struct pcb_tag *tag = by->tag;
	struct pcb_policy *p = by->policy;
	struct inode *inode = mapping->host;
	struct pagecache_ctx *ctx = &call->ctx;

	lockdep_assert_in_rcu_read_lock();
	call->file = file;
	call->policy = p;
	call->hook = hook;
	call->drops = NULL;
	*ctx = (struct pagecache_ctx){
		.ino = inode->i_ino,
		.file_id = file ? (unsigned long)file ^ pcb_file_id_key() : 0,
		.index = index,
		.nr = nr,
		.file_pages = DIV_ROUND_UP_ULL(i_size_read(inode), PAGE_SIZE),
		.resident_pages = READ_ONCE(mapping->nrpages),
		.governed_pages = max_t(s64, atomic64_read(&p->governed), 0),
		.inflight_pages = max_t(s64, atomic64_read(&p->inflight), 0),
		.time_ns = ktime_get_mono_fast_ns(),
		.dev_major = MAJOR(tag->dev),
		.dev_minor = MINOR(tag->dev),
		.generation = tag->generation,
		.model = tag->model->id,
		.tgid = current->tgid,
		.tid = current->pid,
		.node = numa_node_id(),
		.ra_pages = file ? file->f_ra.ra_pages : 0,
		.io_pages = inode_to_bdi(inode)->io_pages,
		.page_shift = PAGE_SHIFT,
		.kept_pages = max_t(s64, atomic64_read(&p->kept), 0),
		.keep_max_pages = READ_ONCE(p->keep_max),
	};
	pcb_describe_cgroup(ctx, file);
	if (mapping_large_folio_support(mapping))
		ctx->flags |= PAGECACHE_F_LARGE_FOLIOS;
	if (file && (file->f_mode & FMODE_WRITE))
		ctx->flags |= PAGECACHE_F_WRITABLE;
	if (file && (file->f_mode & FMODE_RANDOM))
		ctx->flags |= PAGECACHE_F_RANDOM;
	if (file && READ_ONCE(tag->lent))
		ctx->flags |= PAGECACHE_F_LENT;
}
