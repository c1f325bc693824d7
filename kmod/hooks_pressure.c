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
#include <linux/timekeeping.h>

#include "compat.h"
#include "pagecache.h"

#define PCB_SHORTAGES 16 /* cgroups that are noted at a time, the machine among them */
#define PCB_MIN_WANTED PCB_CHUNK_PAGES
#define PCB_MAX_FILES 1024 /* asked about in one round */
#define PCB_MAX_PAUSE (HZ / 5) /* between questions that got nothing */

struct pcb_shortage {
	u64 cgroup_id; /* 0: the machine */
	u64 pages; /* 0: unused */
};

bool pcb_pressure_possible, pcb_pressure_live;
static struct shrinker *pcb_shrinker;
static DEFINE_SPINLOCK(pcb_shortage_lock);
static struct pcb_shortage pcb_shortages[PCB_SHORTAGES];
static unsigned long pcb_pause; /* jiffies */

static void pcb_pressure_work(struct work_struct *work);
static DECLARE_DELAYED_WORK(pcb_pressure_item, pcb_pressure_work);

/* In reclaim: quick, and without sleeping. */
static void notrace pcb_note_shortage(u64 cgroup_id, u64 pages)
{
	struct pcb_shortage *free = NULL;
	unsigned long flags;
	int i;

	/* Whoever comes while it is taken will come again. */
	if (!spin_trylock_irqsave(&pcb_shortage_lock, flags))
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
	spin_unlock_irqrestore(&pcb_shortage_lock, flags);
	if (free)
		queue_delayed_work(pcb_wq, &pcb_pressure_item, READ_ONCE(pcb_pause));
}

static bool pcb_take_shortage(struct pcb_shortage *out)
{
	bool found = false;
	int i;

	spin_lock_irq(&pcb_shortage_lock);
	for (i = 0; i < PCB_SHORTAGES && !found; i++) {
		*out = pcb_shortages[i];
		found = out->pages;
		pcb_shortages[i].pages = 0;
	}
	spin_unlock_irq(&pcb_shortage_lock);
	return found;
}

static bool pcb_asked_for_pressure(const struct pcb_policy *p)
{
	return p->hooks & BIT(PAGECACHE_HOOK_PRESSURE) && rcu_access_pointer(p->ops);
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

/* Nothing is freed here and now. */
static unsigned long pcb_shrink_scan(struct shrinker *shrinker, struct shrink_control *sc)
{
	if ((sc->gfp_mask & (__GFP_FS | __GFP_IO)) == (__GFP_FS | __GFP_IO))
		pcb_note_shortage(0, sc->nr_to_scan);
	return SHRINK_STOP;
}

static void notrace pcb_watch_cgroup(unsigned long ip, unsigned long parent_ip,
				     struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
#ifdef CONFIG_MEMCG
	struct mem_cgroup *memcg = (struct mem_cgroup *)ftrace_regs_get_argument(fregs, 0);
	gfp_t gfp = ftrace_regs_get_argument(fregs, 2);
	int bit = ftrace_test_recursion_trylock(ip, parent_ip);

	if (bit < 0)
		return;
	if ((gfp & (__GFP_FS | __GFP_IO)) == (__GFP_FS | __GFP_IO))
		pcb_note_shortage(cgroup_id(memcg->css.cgroup), ftrace_regs_get_argument(fregs, 1));
	ftrace_test_recursion_unlock(bit);
#endif
}

static void notrace pcb_watch_inode_end(unsigned long ip, unsigned long parent_ip,
					struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct address_space *mapping = (struct address_space *)ftrace_regs_get_argument(fregs, 0);

	if (mapping->host && pcb_tag_possible(mapping->host))
		pcb_tags_forget(mapping->host);
}

static void notrace pcb_watch_clear(unsigned long ip, unsigned long parent_ip,
				    struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct inode *inode = (struct inode *)ftrace_regs_get_argument(fregs, 0);

	if (pcb_tag_possible(inode))
		pcb_tags_forget(inode);
}

/* A page of a governed file has come into the cache.  Under RCU; the folio is locked and charged.
 */
void pcb_pressure_added(struct pcb_policy *p, struct pcb_tag *tag, struct folio *folio)
{
	struct inode *inode = folio->mapping->host;

	if (READ_ONCE(tag->inode) != inode)
		WRITE_ONCE(tag->inode, inode);
#ifdef CONFIG_MEMCG
	if (p->hooks & BIT(PAGECACHE_HOOK_PRESSURE) && !READ_ONCE(p->charged_all)) {
		struct mem_cgroup *memcg = folio_memcg(folio);
		u64 id = memcg ? cgroup_id(memcg->css.cgroup) : 0;
		int i;

		for (i = 0; i < PCB_CHARGED; i++) {
			if (READ_ONCE(p->charged[i]) == id)
				return;
			if (!p->charged[i] && !cmpxchg64(&p->charged[i], 0, id))
				return;
		}
		WRITE_ONCE(p->charged_all, true);
	}
#endif
}

/* One shortage, and what is known of the policy that was asked last. */
struct pcb_relief {
	struct pagecache_pressure want;
	struct cgroup *short_one; /* NULL: the machine */
	u64 policy; /* its seq */
	bool concerned;
};

/* Whether pages of the policy may be charged to the cgroup that is short, or below it. */
static bool pcb_concerned(struct pcb_policy *p, struct pcb_relief *relief)
{
	struct cgroup *charged;
	bool below = false;
	int i;

	if (!relief->short_one || READ_ONCE(p->charged_all))
		return true;
	if (relief->policy == p->seq)
		return relief->concerned;
	for (i = 0; i < PCB_CHARGED && !below && READ_ONCE(p->charged[i]); i++) {
		charged = cgroup_get_from_id(p->charged[i]);
		if (IS_ERR(charged))
			continue; /* gone, or of version 1 */
		below = cgroup_is_descendant(charged, relief->short_one);
		cgroup_put(charged);
	}
	relief->policy = p->seq;
	relief->concerned = below;
	return below;
}

static void pcb_inode_put(struct inode *inode)
{
	struct super_block *sb = inode->i_sb;

	iput(inode);
	up_read(&sb->s_umount);
}

/* The tag's inode, with a reference and its file system's s_umount held for reading; or NULL. */
static struct inode *pcb_inode_get(struct pcb_tag *tag)
{
	struct super_block *sb;
	struct inode *inode, *got = NULL;

	rcu_read_lock();
	inode = READ_ONCE(tag->inode);
	if (inode && inode->i_mapping->nrpages) {
		sb = inode->i_sb;
		if (down_read_trylock(&sb->s_umount)) {
			/* The end of a deleted inode may wait for the file system to be thawed. */
			if (sb->s_root && (sb->s_flags & SB_ACTIVE) && inode->i_nlink)
				got = igrab(inode);
			if (!got)
				up_read(&sb->s_umount);
		}
	}
	rcu_read_unlock();
	/* xfs uses the memory of an inode again before RCU lets go of it. */
	if (got && (got->i_ino != tag->ino || got->i_generation != tag->generation)) {
		pcb_inode_put(got);
		got = NULL;
	}
	return got;
}

static void pcb_ask_pressure(struct pcb_tag *tag, struct pcb_policy *p, struct inode *inode,
			     struct pagecache_pressure *want, struct pcb_drops *drops)
{
	struct pagecache_ops *ops;
	struct pcb_call call;

	rcu_read_lock();
	ops = rcu_dereference(p->ops);
	if (ops && ops->pressure) {
		pcb_call_init(&call, p, tag, PAGECACHE_HOOK_PRESSURE, inode->i_mapping, NULL, 0,
			      want->pages);
		call.drops = drops;
		call.ctx.kind = want->cgroup_id ? PAGECACHE_KIND_CGROUP : PAGECACHE_KIND_MACHINE;
		call.ctx.cgroup_id = want->cgroup_id;
		call.ctx.tgid = call.ctx.tid = 0;
		call.ctx.node = PAGECACHE_NODE_ANY;
		pcb_count(p, pressure_calls, 1);
		ops->pressure(&call.ctx, want);
		pcb_policy_took(p, PAGECACHE_HOOK_PRESSURE, call.ctx.time_ns);
	}
	rcu_read_unlock();
}

static u64 pcb_carry_out_drops(struct inode *inode, const struct pcb_drops *drops)
{
	unsigned int i;
	u64 pages = 0;

	for (i = 0; i < drops->nr; i++) {
		pgoff_t start = drops->at[i].start;

		while (start < drops->at[i].end) {
			pgoff_t end = min_t(pgoff_t, drops->at[i].end, start + PCB_CHUNK_PAGES);

			pages += pcb_drop_now(inode->i_mapping, start, end);
			start = end;
			cond_resched();
		}
	}
	return pages;
}

/*
 * Asks about the next file behind @seq of a policy that this concerns, and drops what it names.
 * Returns the file's seq, or 0 when there is none.
 */
static u64 pcb_pressure_file(u64 seq, struct pcb_relief *relief)
{
	struct pagecache_pressure *want = &relief->want;
	static struct pcb_drops drops; /* the work item does not run twice at a time */
	struct inode *inode = NULL;
	struct pcb_policy *p = NULL;
	struct pcb_tag *tag;
	u64 pages;

	drops.nr = 0;
	mutex_lock(&pcb_mutex);
	while (pcb_pressure_live && !inode && (tag = pcb_tag_after(seq))) {
		seq = tag->seq;
		p = rcu_dereference_protected(tag->policy, lockdep_is_held(&pcb_mutex));
		if (p && pcb_asked_for_pressure(p) && pcb_concerned(p, relief))
			inode = pcb_inode_get(tag);
	}
	if (inode) {
		want->files = atomic_read(&p->tags);
		pcb_count(p, pressure_wanted_bytes, want->pages << PAGE_SHIFT);
		pcb_ask_pressure(tag, p, inode, want, &drops);
		kref_get(&p->ref);
	}
	mutex_unlock(&pcb_mutex);
	if (!inode)
		return 0;

	pages = pcb_carry_out_drops(inode, &drops);
	pcb_count(p, drop_bytes, pages << PAGE_SHIFT);
	pcb_count(p, pressure_dropped_bytes, pages << PAGE_SHIFT);
	want->pages -= min(want->pages, pages);
	pcb_policy_put(p);
	pcb_inode_put(inode);
	return seq;
}

/*
 * Returns pages dropped.  Files are asked about in the order of their tags; of more than can be
 * asked about at a time the others come next time.
 */
static u64 pcb_relieve(const struct pcb_shortage *shortage)
{
	static u64 first; /* the work item does not run twice at a time */
	u64 wanted = max_t(u64, shortage->pages, PCB_MIN_WANTED), seq;
	struct pcb_relief relief = {
		.want = { .cgroup_id = shortage->cgroup_id, .pages = wanted },
	};
	struct pagecache_pressure *want = &relief.want;
	int files;

	if (shortage->cgroup_id) {
		relief.short_one = cgroup_get_from_id(shortage->cgroup_id);
		if (IS_ERR(relief.short_one))
			return 0; /* gone since */
	}
	for (; want->round < 2 && want->pages; want->round++) {
		for (seq = first, files = 0; want->pages && files < PCB_MAX_FILES; files++) {
			seq = pcb_pressure_file(seq, &relief);
			if (!seq)
				break;
		}
	}
	if (want->pages)
		first = seq;
	if (relief.short_one)
		cgroup_put(relief.short_one);
	return wanted - want->pages;
}

static void pcb_pressure_work(struct work_struct *work)
{
	struct pcb_shortage shortage;
	u64 dropped = 0;

	while (READ_ONCE(pcb_pressure_live) && pcb_take_shortage(&shortage))
		dropped += pcb_relieve(&shortage);
	/* Whoever has nothing to give is not asked all the time. */
	WRITE_ONCE(pcb_pause, dropped ? 0 : min(2 * pcb_pause + 1, PCB_MAX_PAUSE));
}

static struct pcb_ftrace pcb_pressure_watches[] = {
	{ .name = "truncate_inode_pages_final", .ops = { .func = pcb_watch_inode_end } },
	{ .name = "clear_inode", .ops = { .func = pcb_watch_clear } },
	{ .name = "try_to_free_mem_cgroup_pages", .ops = { .func = pcb_watch_cgroup } },
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
	pcb_pause = 0;
	/* From here on inodes are known: their end is watched. */
	WRITE_ONCE(pcb_pressure_live, true);
	shrinker_register(pcb_shrinker);
	return 0;
}

/* The work item may be waiting for pcb_mutex, which is held here; it finds nothing to do. */
static void pcb_pressure_off(void)
{
	shrinker_free(pcb_shrinker);
	WRITE_ONCE(pcb_pressure_live, false);
	/* Those who saw it true have left; then no inode is known any more, and none is watched. */
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
