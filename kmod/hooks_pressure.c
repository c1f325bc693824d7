// SPDX-License-Identifier: GPL-2.0-only
/*
 * hooks_pressure.c - the pressure hook: memory is short, what is to be dropped first?
 *
 * A shrinker tells that the machine is short; try_to_free_mem_cgroup_pages(), which is watched with
 * ftrace, that a memory cgroup is (shrinkers that are told of cgroups are only called for those
 * that a private bitmap names).  Both run in reclaim: they note how much is wanted and wake a work
 * item.  Reclaim does not wait for it and goes on by itself.
 *
 * The work item asks the policies about their files and drops what they name.  For that it needs
 * the inodes of tagged files, to which nobody holds a reference.  A tag learns its inode when a
 * page is added, and forgets it when the inode is on its way out: truncate_inode_pages_final(), the
 * first thing that happens then, is watched, and clear_inode() for file systems that do it in their
 * own way.  Whoever reads the pointer under RCU therefore sees memory that is still an inode;
 * igrab() tells whether it is still in use.  The work item also holds s_umount, so that an unmount
 * waits for it instead of failing.
 */
#include <linux/cgroup.h>
#include <linux/ftrace.h>
#include <linux/memcontrol.h>
#include <linux/shrinker.h>

#include "hooks.h"
#include "hooks_pressure.h"

#define PCB_SHORTAGES 16 /* cgroups that are noted at a time, the machine among them */

bool pcb_pressure_possible, pcb_pressure_live;
static struct shrinker *pcb_shrinker;
static DEFINE_RAW_SPINLOCK(pcb_shortage_lock); /* taken with preemption off */
static struct pcb_shortage pcb_shortages[PCB_SHORTAGES];

/* In reclaim: quick, and without sleeping. */
static void notrace pcb_note_shortage(u64 cgroup_id, u64 pages)
{
	struct pcb_shortage *free = NULL;
	unsigned long flags;
	int i;

	/* Reclaim does not wait for the lock: it calls again if memory stays short. */
	if (!raw_spin_trylock_irqsave(&pcb_shortage_lock, flags))
		return;
	for (i = 0; i < PCB_SHORTAGES; i++) {
		struct pcb_shortage *s = &pcb_shortages[i];

		if (s->pages && s->cgroup_id == cgroup_id) {
			free = s;
			break;
		}
		if (!s->pages && !free)
			free = s;
	}
	if (free) {
		free->cgroup_id = cgroup_id;
		free->pages += pages;
	}
	raw_spin_unlock_irqrestore(&pcb_shortage_lock, flags);
	if (free)
		queue_delayed_work(pcb_wq, &pcb_pressure_item, READ_ONCE(pcb_pressure_pause));
}

bool pcb_take_shortage(struct pcb_shortage *out)
{
	bool found = false;
	int i;

	raw_spin_lock_irq(&pcb_shortage_lock);
	for (i = 0; i < PCB_SHORTAGES && !found; i++) {
		*out = pcb_shortages[i];
		found = out->pages;
		pcb_shortages[i].pages = 0;
	}
	raw_spin_unlock_irq(&pcb_shortage_lock);
	return found;
}

static unsigned long pcb_shrink_count(struct shrinker *shrinker, struct shrink_control *sc)
{
	unsigned long pages = 0;
	struct pcb_policy *p;

	rcu_read_lock();
	list_for_each_entry_rcu(p, &pcb_policies, list)
	{
		if (pcb_asked_for_pressure(p))
			pages += max_t(s64, atomic64_read(&p->governed), 0);
	}
	rcu_read_unlock();
	return pages;
}

/* The shrinker's scan: it frees nothing itself, but notes the shortage. */
static unsigned long pcb_shrink_scan(struct shrinker *shrinker, struct shrink_control *sc)
{
	/* Whatever the mask: it is a work item that drops, not this task. */
	pcb_note_shortage(0, sc->nr_to_scan);
	return SHRINK_STOP;
}

#ifdef CONFIG_MEMCG
/* An id that tells cgroups of both versions apart: theirs overlap. */
static u64 notrace pcb_charge_id(struct mem_cgroup *memcg)
{
	u64 id = cgroup_id(memcg->css.cgroup);

	return memcg->css.cgroup->root == &cgrp_dfl_root ? id : id | PCB_CGROUP_V1;
}
#endif

static void notrace pcb_watch_cgroup(unsigned long ip, unsigned long parent_ip,
				     struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
#ifdef CONFIG_MEMCG
	struct mem_cgroup *memcg = (struct mem_cgroup *)ftrace_regs_get_argument(fregs, 0);

	/* Of any reclaim: pages of XFS are charged without __GFP_FS (xfs_setup_inode()). */
	pcb_unless_recursing(ip, parent_ip)
		pcb_note_shortage(pcb_charge_id(memcg), ftrace_regs_get_argument(fregs, 1));
#endif
}

static void notrace pcb_watch_inode_end(unsigned long ip, unsigned long parent_ip,
					struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct address_space *mapping = (struct address_space *)ftrace_regs_get_argument(fregs, 0);

	if (mapping->host && pcb_tag_possible(mapping->host))
		pcb_tags_forget(mapping->host, PCB_SIGHT_TRUNCATED);
}

static void notrace pcb_watch_clear(unsigned long ip, unsigned long parent_ip,
				    struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct inode *inode = (struct inode *)ftrace_regs_get_argument(fregs, 0);

	if (pcb_tag_possible(inode))
		pcb_tags_forget(inode, PCB_SIGHT_CLEARED);
}

/* Whom a page of the file is charged to.  Under RCU; the folio is locked or in use. */
void pcb_note_charge(struct pcb_tag *tag, struct folio *folio)
{
#ifdef CONFIG_MEMCG
	struct mem_cgroup *memcg = folio_memcg(folio);
	u64 id = memcg ? pcb_charge_id(memcg) : 0;

	lockdep_assert_in_rcu_read_lock();
	if (!id || READ_ONCE(tag->charged[0]) == id)
		return;
	/* The last two cgroups are remembered, so that two which take turns are both known. */
	WRITE_ONCE(tag->charged[1], READ_ONCE(tag->charged[0]));
	WRITE_ONCE(tag->charged[0], id);
#endif
}

/* A page of a governed file has come into the cache.  Under RCU; the folio is locked and charged.
 */
void pcb_pressure_added(struct pcb_tag *tag, struct folio *folio)
{
	struct inode *inode = folio->mapping->host;

	lockdep_assert_in_rcu_read_lock();
	VM_WARN_ON_ONCE_FOLIO(!folio_test_locked(folio), folio);
	if (READ_ONCE(tag->inode) != inode)
		WRITE_ONCE(tag->inode, inode);
	pcb_note_charge(tag, folio);
}

pcb_check_prototype(truncate_inode_pages_final, void(struct address_space *));
pcb_check_prototype(clear_inode, void(struct inode *));

static struct pcb_ftrace pcb_pressure_watches[] = {
	{ .name = "truncate_inode_pages_final",
	  .prototype = "void(address_space *)",
	  .ops = { .func = pcb_watch_inode_end } },
	{ .name = "clear_inode", .prototype = "void(inode *)", .ops = { .func = pcb_watch_clear } },
	{ .name = "try_to_free_mem_cgroup_pages",
	  .prototype = "int64(mem_cgroup *, int64, int32, int32, pointer)",
	  .ops = { .func = pcb_watch_cgroup } },
};

/* A kernel without them has the other hooks; a policy with this one does not attach. */
static int pcb_pressure_prepare(void)
{
	pcb_pressure_possible =
		!pcb_ftrace_prepare(pcb_pressure_watches, ARRAY_SIZE(pcb_pressure_watches));
	return 0;
}

static int pcb_pressure_on(const char **failed)
{
	int err;

	if (!pcb_pressure_possible) {
		*failed = "pressure: this kernel's reclaim cannot be watched";
		return -EOPNOTSUPP;
	}
	pcb_shrinker = shrinker_alloc(0, "pagecache_bpf");
	if (!pcb_shrinker) {
		*failed = "pressure: no memory for a shrinker";
		return -ENOMEM;
	}
	pcb_shrinker->count_objects = pcb_shrink_count;
	pcb_shrinker->scan_objects = pcb_shrink_scan;
	err = pcb_ftrace_on(pcb_pressure_watches, ARRAY_SIZE(pcb_pressure_watches));
	if (err) {
		shrinker_free(pcb_shrinker);
		*failed = "pressure: ftrace refuses to watch reclaim";
		return err;
	}
	pcb_pressure_pause = 0;
	/* From here on inodes are known: their end is watched. */
	WRITE_ONCE(pcb_pressure_live, true);
	shrinker_register(pcb_shrinker);
	return 0;
}

/* The work item may be waiting for pcb_mutex, which is held here; it finds nothing to do. */
static void pcb_pressure_off(void)
{
	lockdep_assert_held(&pcb_mutex);
	shrinker_free(pcb_shrinker);
	WRITE_ONCE(pcb_pressure_live, false);
	/* After this no hook that saw it true runs any more, and no inode pointer is read. */
	synchronize_rcu();
	pcb_tags_forget_inodes();
	pcb_ftrace_off(pcb_pressure_watches, ARRAY_SIZE(pcb_pressure_watches));
}

static void pcb_pressure_release(void)
{
	if (!pcb_pressure_possible)
		return;
	pcb_ftrace_release(pcb_pressure_watches, ARRAY_SIZE(pcb_pressure_watches));
	cancel_delayed_work_sync(&pcb_pressure_item);
}

struct pcb_hook_family pcb_pressure_hooks = {
	.name = "pressure",
	.hooks = BIT(PAGECACHE_HOOK_PRESSURE),
	.prepare = pcb_pressure_prepare,
	.on = pcb_pressure_on,
	.off = pcb_pressure_off,
	.release = pcb_pressure_release,
};
