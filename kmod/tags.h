/* SPDX-License-Identifier: GPL-2.0-only */
/* tags.h - which files are governed by which policy. */
#ifndef PCB_TAGS_H
#define PCB_TAGS_H

#include <linux/fs.h>
#include <linux/hash.h>
#include <linux/list.h>
#include <linux/rcupdate.h>

#include "keep_map.h"
#include "policy.h"

struct pcb_model {
	struct list_head list;
	unsigned int refs;
	u32 id;
	char name[PAGECACHE_MODEL_LEN];
};

#define PCB_NO_ACCESS (~0ULL)
#define PCB_CHARGED 2
#define PCB_CGROUP_V1 (1ULL << 63) /* part of an id in pcb_tag.charged: of another hierarchy */

/* What a hook has seen of the canary's file (canary.c). */
enum pcb_sight {
	PCB_SIGHT_NONE, /* of no use as a proof */
	PCB_SIGHT_MISS,
	PCB_SIGHT_MARKER,
	PCB_SIGHT_FAULT,
	PCB_SIGHT_READ,
	PCB_SIGHT_TOUCH,
	PCB_SIGHT_ADDED,
	PCB_SIGHT_REMOVED,
	PCB_SIGHT_EVICT,
	PCB_SIGHT_TRUNCATED,
	PCB_SIGHT_CLEARED,
};

/*
 * A tag names a file by (device, inode, generation) and holds no reference to it: the file can be
 * deleted, the file system unmounted.  Found under RCU from an inode.
 *
 * A device number of a file system without a device (NFS, FUSE) is given to the next one when it is
 * unmounted: its tags end with it (hooks_super.c).  In file systems that have several trees of
 * inodes (btrfs: subvolumes, snapshots) inodes of the same number and generation are told apart by
 * the tree.
 */
struct pcb_tag {
	struct hlist_node hash;
	u64 ino;
	dev_t dev;
	u32 generation;
	u32 tree; /* of file systems with several trees of inodes: which; else 0 */
	struct pcb_policy __rcu *policy; /* NULL: its policy is not attached */
	struct pcb_keep __rcu *keep; /* NULL: its policy has no evict hook */
	struct pcb_model *model;
	u32 lent; /* sessions that lend the file (sessions.c) */
	bool canary; /* it has no policy, but notes what hooks see of its file */
	/* What follows is written for each read or folio; what is above is read for each look-up.
	 */
	u64 access_end ____cacheline_aligned_in_smp; /* of the last range told, or PCB_NO_ACCESS */
	atomic64_t resident; /* pages in the cache, once it is synced */
	bool synced; /* resident is right; else it is 0, and the next hook makes it right */
	u64 charged[PCB_CHARGED]; /* memory cgroups of pages that came in, the last first; see below
				   */
	struct inode *inode; /* read under RCU; see hooks_pressure.c */
	struct list_head list; /* pcb_tags, by seq, under pcb_mutex */
	struct rcu_head rcu;
	u64 seq;
	u64 pages; /* size of the file when it was tagged */
	unsigned long sights; /* of a canary: bit per enum pcb_sight */
	char policy_name[PAGECACHE_NAME_LEN];
	char path[];
};

#define PCB_TAG_BITS 14
extern struct hlist_head *pcb_tag_table;

static __always_inline struct hlist_head *pcb_bucket(dev_t dev, u64 ino)
{
	return &pcb_tag_table[hash_64(ino ^ ((u64)dev << 40), PCB_TAG_BITS)];
}

/*
 * The cheap test: for a file that is not tagged, one load and usually no comparison.  False: not
 * tagged.  Needs no lock: the table lives as long as the module.
 */
static __always_inline bool pcb_tag_possible(const struct inode *inode)
{
	return READ_ONCE(pcb_bucket(inode->i_sb->s_dev, inode->i_ino)->first);
}

/* What governs a file; valid under the RCU lock that it was looked up under. */
struct pcb_governance {
	struct pcb_tag *tag; /* NULL: the file is not tagged */
	struct pcb_policy *policy; /* NULL: its policy is not attached */
	struct pagecache_ops *ops; /* NULL: its policy has ended */
};

int pcb_tags_init(void);
void pcb_tags_clear(void);
void pcb_tags_free(void);
void pcb_tags_drop_device(dev_t dev);
void pcb_tags_unsync(void);
struct pcb_tag *pcb_tag_find(const struct inode *inode);
struct pcb_governance pcb_governance_of(struct address_space *mapping);
bool pcb_tag_count_resident(const struct pcb_governance *by, struct address_space *mapping);

/*
 * Makes the tag's count of resident pages right, if it is not.  Under RCU, in each hook.  Returns
 * true when it was not.
 */
static inline bool pcb_tag_sync(const struct pcb_governance *by, struct address_space *mapping)
{
	return unlikely(!READ_ONCE(by->tag->synced)) && pcb_tag_count_resident(by, mapping);
}

/* A hook runs about the tag's file.  Under RCU. */
static __always_inline void pcb_saw(struct pcb_tag *tag, enum pcb_sight sight)
{
	if (unlikely(tag->canary))
		set_bit(sight, &tag->sights);
}

struct pcb_tag *pcb_tag_canary(struct inode *inode);
unsigned long pcb_tag_canary_end(struct pcb_tag *tag);
int pcb_tag_add(struct file *file, const struct pagecache_tag_request *req);
int pcb_tag_del(struct file *file, const struct pagecache_untag_request *req);
int pcb_tag_next(struct pagecache_tag_record *rec);
u32 pcb_tag_count(void);
void pcb_tags_bind(struct pcb_policy *p);
void pcb_tags_unbind(struct pcb_policy *p);
void pcb_tags_rekeep(struct pcb_policy *p, u32 hooks);
struct pcb_tag *pcb_tag_after(u64 seq);
void pcb_tags_forget(struct inode *inode, enum pcb_sight sight);
void pcb_tags_forget_inodes(void);

/*
 * keep.c: what one policy keeps of one file.  Belongs to one pair of tag and policy, whose kept and
 * keep_max it counts.
 */
struct pcb_keep {
	struct rcu_head rcu;
	struct pcb_policy *policy;
	struct pcb_keep_map map;
};

u64 pcb_max_keep_pages(void);
u64 pcb_keep_budget(struct pcb_policy *p, u64 pages);
struct pcb_keep *pcb_keep_new(struct pcb_policy *p, u32 hooks, u64 pages);
void pcb_keep_free(struct pcb_keep *keep);
bool pcb_keep_add(struct pcb_keep *keep, pgoff_t index, unsigned long nr);
void pcb_keep_del(struct pcb_keep *keep, pgoff_t index, unsigned long nr);

#endif /* PCB_TAGS_H */
