// SPDX-License-Identifier: GPL-2.0-only
/*
 * pressure.c - memory is short: asks policies about their files and drops what they name.
 *
 * For that it needs the inodes of tagged files, to which nobody holds a reference; hooks_pressure.c
 * says why those it reads are still inodes.  igrab() tells whether one is still in use.  s_umount
 * is held, too, so that an unmount waits instead of failing.
 */
#include <linux/cgroup.h>
#include <linux/fs.h>
#include <linux/pagemap.h>

#include "hooks.h"
#include "hooks_pressure.h"
#include "prefetch.h"

#define PCB_MIN_WANTED PCB_CHUNK_PAGES
#define PCB_MAX_FILES 1024 /* asked about in one round */
#define PCB_MAX_PAUSE (HZ / 5)

static void pcb_pressure_work(struct work_struct *work);
DECLARE_DELAYED_WORK(pcb_pressure_item, pcb_pressure_work);
unsigned long pcb_pressure_pause;

bool pcb_asked_for_pressure(const struct pcb_policy *p)
{
	return p->hooks & BIT(PAGECACHE_HOOK_PRESSURE) && rcu_access_pointer(p->ops);
}

/* One shortage, and what has been found out for it. */
struct pcb_relief {
	struct pagecache_pressure want;
	u64 short_id; /* as in pcb_tag.charged; 0: the machine */
	struct cgroup *short_one; /* NULL: the machine, or a cgroup of version 1 */
	u64 first,
		last; /* files (seq) that are asked about: behind the one, not behind the other */
	u64 known_id; /* a cgroup, and whether it is the one that is short or below it */
	bool known_below;
};

static bool pcb_below(u64 id, struct pcb_relief *relief)
{
	struct cgroup *charged;

	if (id == relief->short_id)
		return true;
	if (!id || (id & PCB_CGROUP_V1) || !relief->short_one)
		return false;
	if (relief->known_id == id)
		return relief->known_below;
	charged = cgroup_get_from_id(id);
	relief->known_id = id;
	relief->known_below = false;
	if (IS_ERR(charged))
		return false; /* gone */
	relief->known_below = cgroup_is_descendant(charged, relief->short_one);
	cgroup_put(charged);
	return relief->known_below;
}

/* Learns the cgroups of a file that was cached before charges were noted, from a few of its pages.
 */
static void pcb_learn_charge(struct pcb_tag *tag, struct inode *inode)
{
	struct folio_batch batch;
	pgoff_t start = 0;
	unsigned int i;

	folio_batch_init(&batch);
	filemap_get_folios(inode->i_mapping, &start, ULONG_MAX, &batch);
	rcu_read_lock();
	for (i = 0; i < folio_batch_count(&batch); i++)
		pcb_note_charge(tag, batch.folios[i]);
	rcu_read_unlock();
	folio_batch_release(&batch);
}

/*
 * Whether pages of the file may be charged to the cgroup that is short, or below it.  What is
 * charged to others is of no use to it.
 */
static bool pcb_concerned(const struct pcb_tag *tag, struct pcb_relief *relief)
{
	unsigned int i;

	if (!relief->short_id)
		return true;
	for (i = 0; i < PCB_CHARGED; i++) {
		if (pcb_below(READ_ONCE(tag->charged[i]), relief))
			return true;
	}
	return false;
}

static void pcb_inode_put(struct inode *inode)
{
	struct super_block *sb = inode->i_sb;

	lockdep_assert_held_read(&sb->s_umount);
	iput(inode);
	up_read(&sb->s_umount);
}

/* The tag's inode, with a reference and its file system's s_umount held for reading; or NULL. */
static struct inode *pcb_inode_get(struct pcb_tag *tag)
{
	struct super_block *sb;
	struct inode *inode, *got = NULL;

	lockdep_assert_held(&pcb_mutex);
	rcu_read_lock();
	inode = pcb_ftrace_works() ? READ_ONCE(tag->inode) : NULL;
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
	struct pcb_governance by = { .tag = tag, .policy = p };
	struct pcb_call call;

	rcu_read_lock();
	by.ops = rcu_dereference(p->ops);
	if (by.ops && by.ops->pressure) {
		pcb_call_init(&call, &by, PAGECACHE_HOOK_PRESSURE, inode->i_mapping, NULL, 0,
			      want->pages);
		call.drops = drops;
		call.ctx.kind = want->cgroup_id ? PAGECACHE_KIND_CGROUP : PAGECACHE_KIND_MACHINE;
		call.ctx.cgroup_id = want->cgroup_id;
		call.ctx.charged_cgroup_id = READ_ONCE(tag->charged[0]) & ~PCB_CGROUP_V1;
		call.ctx.tgid = call.ctx.tid = 0;
		call.ctx.node = PAGECACHE_NODE_ANY;
		pcb_count(p, pressure_calls, 1);
		by.ops->pressure(&call.ctx, want);
		pcb_policy_took(p, PAGECACHE_HOOK_PRESSURE, call.ctx.time_ns);
	}
	rcu_read_unlock();
}

static u64 pcb_carry_out_drops(struct inode *inode, const struct pcb_drops *drops)
{
	unsigned int i;
	u64 pages = 0;

	for (i = 0; i < drops->nr; i++)
		pages += pcb_drop_now(inode->i_mapping, drops->at[i].start, drops->at[i].end);
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
	while (pcb_pressure_live && !inode && (tag = pcb_tag_after(seq)) &&
	       tag->seq <= relief->last) {
		seq = tag->seq;
		p = rcu_dereference_protected(tag->policy, lockdep_is_held(&pcb_mutex));
		if (!p || !pcb_asked_for_pressure(p))
			continue;
		if (READ_ONCE(tag->charged[0]) && !pcb_concerned(tag, relief))
			continue;
		inode = pcb_inode_get(tag);
		if (!inode || READ_ONCE(tag->charged[0]))
			continue;
		pcb_learn_charge(tag, inode);
		if (pcb_concerned(tag, relief))
			continue;
		mutex_unlock(&pcb_mutex);
		pcb_inode_put(inode);
		inode = NULL;
		mutex_lock(&pcb_mutex);
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

/* Asks about the files between relief->first and relief->last.  Returns the last one asked. */
static u64 pcb_pressure_files(struct pcb_relief *relief, int *files)
{
	u64 seq = relief->first, next;

	while (relief->want.pages && *files < PCB_MAX_FILES) {
		next = pcb_pressure_file(seq, relief);
		if (!next)
			return 0;
		seq = next;
		++*files;
	}
	return seq;
}

/*
 * Returns pages dropped.  Files are asked about in the order of their tags, beginning behind the
 * one that was the last to be asked: of more than can be asked about at a time the others come
 * next.
 */
static u64 pcb_relieve(const struct pcb_shortage *shortage)
{
	static u64 first; /* the work item does not run twice at a time */
	u64 wanted = max_t(u64, shortage->pages, PCB_MIN_WANTED), seq = first;
	struct pcb_relief relief = {
		.want = { .cgroup_id = shortage->cgroup_id & ~PCB_CGROUP_V1, .pages = wanted },
		.short_id = shortage->cgroup_id,
	};
	struct pagecache_pressure *want = &relief.want;
	int files;

	if (relief.short_id && !(relief.short_id & PCB_CGROUP_V1)) {
		relief.short_one = cgroup_get_from_id(relief.short_id);
		if (IS_ERR(relief.short_one))
			return 0; /* gone since */
	}
	for (; want->round < 2 && want->pages; want->round++) {
		files = 0;
		relief.first = first;
		relief.last = U64_MAX;
		seq = pcb_pressure_files(&relief, &files);
		if (seq || !first)
			continue;
		relief.first = 0;
		relief.last = first;
		seq = pcb_pressure_files(&relief, &files);
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
	WRITE_ONCE(pcb_pressure_pause,
		   dropped ? 0 : min(2 * pcb_pressure_pause + 1, PCB_MAX_PAUSE));
}
