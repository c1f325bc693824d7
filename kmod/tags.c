// SPDX-License-Identifier: GPL-2.0-only
/* tags.c - which files are governed by which policy. */
#include <linux/dcache.h>
#include <linux/hash.h>
#include <linux/exportfs.h>
#include <linux/hashtable.h>
#include <linux/jhash.h>
#include <linux/kdev_t.h>
#include <linux/rculist.h>
#include <linux/slab.h>

#include "tags.h"
#include "hooks.h"
#include "hooks_pressure.h"
#include "sessions.h"

#define PCB_MAX_TAGS (1U << 20)

struct hlist_head *pcb_tag_table __read_mostly;
static LIST_HEAD(pcb_tags);
static LIST_HEAD(pcb_models);
static u64 pcb_tag_seq;
static u32 pcb_tag_total;
static u32 pcb_model_ids;
static u64 pcb_tag_changes; /* insertions and removals */

/*
 * Which tree of inodes an inode belongs to; 0: the file system has one, or does not say.  Those
 * that have more number themselves as if they had no device; what they hand out for an inode to be
 * found again (file handles) names the tree.
 */
static u32 pcb_tree_of(const struct inode *inode)
{
	const struct super_block *sb = inode->i_sb;
	u32 handle[16];
	int words = ARRAY_SIZE(handle), type;

	if (MAJOR(sb->s_dev) || !(sb->s_type->fs_flags & FS_REQUIRES_DEV))
		return 0;
	if (!sb->s_export_op || !sb->s_export_op->encode_fh)
		return 0;
	type = sb->s_export_op->encode_fh((struct inode *)inode, handle, &words, NULL);
	if (type < 0 || type == FILEID_INVALID || words > ARRAY_SIZE(handle))
		return 0;
	return jhash2(handle, words, 0) | 1;
}

static struct pcb_tag *pcb_tag_lookup(dev_t dev, u64 ino, u32 generation)
{
	struct pcb_tag *tag;

	hlist_for_each_entry_rcu (tag, pcb_bucket(dev, ino), hash, lockdep_is_held(&pcb_mutex)) {
		if (tag->ino == ino && tag->dev == dev && tag->generation == generation)
			return tag;
	}
	return NULL;
}

/* Under RCU or pcb_mutex. */
struct pcb_tag *pcb_tag_find(const struct inode *inode)
{
	dev_t dev = inode->i_sb->s_dev;
	struct pcb_tag *tag;

	hlist_for_each_entry_rcu (tag, pcb_bucket(dev, inode->i_ino), hash,
				  lockdep_is_held(&pcb_mutex)) {
		if (tag->ino == inode->i_ino && tag->dev == dev &&
		    tag->generation == inode->i_generation &&
		    (!tag->tree || tag->tree == pcb_tree_of(inode)))
			return tag;
	}
	return NULL;
}

/*
 * The first hook that meets the file counts its pages, whoever brought them.  Pages that are added
 * at this very moment may be counted twice: the kernel tells of them when they are in.
 */
bool pcb_tag_count_resident(const struct pcb_governance *by, struct address_space *mapping)
{
	struct pcb_tag *tag = by->tag;
	long pages;

	lockdep_assert_in_rcu_read_lock();
	if (cmpxchg(&tag->synced, false, true))
		return false;
	pages = mapping->nrpages;
	atomic64_add(pages, &tag->resident);
	if (by->policy)
		atomic64_add(pages, &by->policy->governed);
	return true;
}

/* Forgets how many pages are resident: the hooks that keep count are off. */
void pcb_tags_unsync(void)
{
	struct pcb_tag *tag;

	lockdep_assert_held(&pcb_mutex);
	list_for_each_entry (tag, &pcb_tags, list) {
		atomic64_set(&tag->resident, 0);
		WRITE_ONCE(tag->synced, false);
	}
}

/* Who is to be asked about the pages of @mapping.  Under RCU. */
struct pcb_governance pcb_governance_of(struct address_space *mapping)
{
	struct pcb_governance by;

	lockdep_assert_in_rcu_read_lock();
	by = (struct pcb_governance){ .tag = pcb_tag_find(mapping->host) };
	if (by.tag)
		by.policy = rcu_dereference(by.tag->policy);
	if (by.policy)
		by.ops = rcu_dereference(by.policy->ops);
	return by;
}

static struct pcb_model *pcb_model_get(const char *name)
{
	struct pcb_model *model;

	lockdep_assert_held(&pcb_mutex);
	list_for_each_entry (model, &pcb_models, list) {
		if (!strcmp(model->name, name)) {
			model->refs++;
			return model;
		}
	}
	model = kzalloc(sizeof(*model), GFP_KERNEL);
	if (!model)
		return NULL;
	strscpy(model->name, name, sizeof(model->name));
	model->refs = 1;
	model->id = ++pcb_model_ids;
	list_add_tail(&model->list, &pcb_models);
	return model;
}

static void pcb_model_put(struct pcb_model *model)
{
	lockdep_assert_held(&pcb_mutex);
	if (--model->refs)
		return;
	list_del(&model->list);
	/* A hook may still be reading the id through its tag. */
	synchronize_rcu();
	kfree(model);
}

/* Without memory for the record of what is kept, nothing of the file is. */
static void pcb_tag_bind(struct pcb_tag *tag, struct pcb_policy *p, struct pcb_keep *keep)
{
	lockdep_assert_held(&pcb_mutex);
	atomic_inc(&p->tags);
	WRITE_ONCE(tag->access_end, PCB_NO_ACCESS);
	rcu_assign_pointer(tag->keep, keep);
	rcu_assign_pointer(tag->policy, p);
	atomic64_add(atomic64_read(&tag->resident), &p->governed);
}

static void pcb_tag_unbind(struct pcb_tag *tag)
{
	struct pcb_policy *p = rcu_dereference_protected(tag->policy, lockdep_is_held(&pcb_mutex));

	lockdep_assert_held(&pcb_mutex);
	if (!p)
		return;
	rcu_assign_pointer(tag->policy, NULL);
	pcb_keep_free(rcu_replace_pointer(tag->keep, NULL, lockdep_is_held(&pcb_mutex)));
	atomic64_sub(atomic64_read(&tag->resident), &p->governed);
	atomic_dec(&p->tags);
}

/* A policy was attached: the tags that name it become active. */
void pcb_tags_bind(struct pcb_policy *p)
{
	struct pcb_tag *tag;

	lockdep_assert_held(&pcb_mutex);
	list_for_each_entry (tag, &pcb_tags, list) {
		if (!strcmp(tag->policy_name, p->name))
			pcb_tag_bind(tag, p, pcb_keep_new(p, p->hooks, tag->pages));
	}
}

/* A policy has ended; its tags stay, inactive. */
void pcb_tags_unbind(struct pcb_policy *p)
{
	struct pcb_tag *tag;

	lockdep_assert_held(&pcb_mutex);
	list_for_each_entry (tag, &pcb_tags, list) {
		if (rcu_access_pointer(tag->policy) == p)
			pcb_tag_unbind(tag);
	}
}

/*
 * The policy's hooks become these: records of what is kept are there for the files of a policy that
 * evicts, and for no others.
 */
void pcb_tags_rekeep(struct pcb_policy *p, u32 hooks)
{
	bool wanted = hooks & BIT(PAGECACHE_HOOK_EVICT);
	struct pcb_tag *tag;

	lockdep_assert_held(&pcb_mutex);
	list_for_each_entry (tag, &pcb_tags, list) {
		if (rcu_access_pointer(tag->policy) != p)
			continue;
		if (wanted && !rcu_access_pointer(tag->keep))
			rcu_assign_pointer(tag->keep, pcb_keep_new(p, hooks, tag->pages));
		else if (!wanted)
			pcb_keep_free(
				rcu_replace_pointer(tag->keep, NULL, lockdep_is_held(&pcb_mutex)));
	}
}

static void pcb_tag_remove(struct pcb_tag *tag)
{
	struct pcb_model *model = tag->model;

	lockdep_assert_held(&pcb_mutex);
	pcb_tag_unbind(tag);
	hlist_del_rcu(&tag->hash);
	list_del(&tag->list);
	pcb_tag_total--;
	pcb_tag_changes++;
	if (!MAJOR(tag->dev))
		pcb_hooks_release_family(&pcb_super_hooks);
	kfree_rcu(tag, rcu);
	pcb_model_put(model);
}

/* overlayfs: the pages live in the inode underneath. */
static struct inode *pcb_backing_inode(struct file *file)
{
	return d_real_inode(file->f_path.dentry);
}

static int pcb_tag_insert(struct inode *inode, const struct pagecache_tag_request *req)
{
	struct pcb_policy *p = pcb_policy_find(req->policy);
	struct pcb_governance by = { .policy = p };
	struct pcb_tag *tag, *old;
	size_t len = strnlen(req->path, sizeof(req->path) - 1);
	int err;

	lockdep_assert_held(&pcb_mutex);
	if (!p)
		return -ESRCH;
	old = pcb_tag_find(inode);
	if (old && !(req->flags & PAGECACHE_TAG_REPLACE))
		return -EEXIST;
	if (pcb_tag_total >= PCB_MAX_TAGS)
		return -ENOSPC;

	tag = kzalloc(struct_size(tag, path, len + 1), GFP_KERNEL);
	if (!tag)
		return -ENOMEM;
	tag->model = pcb_model_get(req->model);
	if (!tag->model) {
		kfree(tag);
		return -ENOMEM;
	}
	if (!MAJOR(inode->i_sb->s_dev)) {
		err = pcb_hooks_hold_family(&pcb_super_hooks);
		if (err) {
			pcb_model_put(tag->model);
			kfree(tag);
			return err;
		}
	}
	if (old)
		pcb_tag_remove(old);
	tag->dev = inode->i_sb->s_dev;
	tag->ino = inode->i_ino;
	tag->generation = inode->i_generation;
	tag->tree = pcb_tree_of(inode);
	tag->pages = DIV_ROUND_UP_ULL(i_size_read(inode), PAGE_SIZE);
	tag->lent = pcb_lent_times(inode);
	tag->seq = ++pcb_tag_seq;
	strscpy(tag->policy_name, req->policy, sizeof(tag->policy_name));
	memcpy(tag->path, req->path, len);
	if (pcb_pressure_live)
		tag->inode = inode;
	pcb_tag_bind(tag, p, pcb_keep_new(p, p->hooks, tag->pages));
	hlist_add_head_rcu(&tag->hash, pcb_bucket(tag->dev, tag->ino));
	list_add_tail(&tag->list, &pcb_tags);
	by.tag = tag;
	rcu_read_lock();
	pcb_tag_sync(&by, inode->i_mapping);
	rcu_read_unlock();
	pcb_tag_total++;
	pcb_tag_changes++;
	return 0;
}

/*
 * Returns 0, -ESRCH (no such policy attached), -EEXIST (already tagged), -EINVAL (not a
 * regular file, or one without pages), -EBADF (not open for reading), -ENOSPC, -ENOMEM.
 */
int pcb_tag_add(struct file *file, const struct pagecache_tag_request *req)
{
	struct inode *inode = pcb_backing_inode(file);
	int err;

	if (!(file->f_mode & FMODE_READ))
		return -EBADF;
	if (!S_ISREG(inode->i_mode) || IS_DAX(inode))
		return -EINVAL;
	if (!inode->i_mapping->a_ops->read_folio && !inode->i_mapping->a_ops->readahead)
		return -EINVAL;
	if (req->flags & ~PAGECACHE_TAG_REPLACE || !req->model[0] || !req->policy[0])
		return -EINVAL;

	mutex_lock(&pcb_mutex);
	err = pcb_tag_insert(inode, req);
	mutex_unlock(&pcb_mutex);
	return err;
}

/*
 * A tag for a file of the module's own.  It is found by hooks, but no part of the list of tags, and
 * has no policy.  NULL: no memory.
 */
struct pcb_tag *pcb_tag_canary(struct inode *inode)
{
	struct pcb_tag *tag = kzalloc(struct_size(tag, path, 1), GFP_KERNEL);

	lockdep_assert_held(&pcb_mutex);
	if (!tag)
		return NULL;
	tag->canary = true;
	tag->dev = inode->i_sb->s_dev;
	tag->ino = inode->i_ino;
	tag->generation = inode->i_generation;
	hlist_add_head_rcu(&tag->hash, pcb_bucket(tag->dev, tag->ino));
	return tag;
}

/* Returns what hooks have seen: a bit per enum pcb_sight. */
unsigned long pcb_tag_canary_end(struct pcb_tag *tag)
{
	unsigned long sights = READ_ONCE(tag->sights);

	lockdep_assert_held(&pcb_mutex);
	hlist_del_rcu(&tag->hash);
	kfree_rcu(tag, rcu);
	return sights;
}

int pcb_tag_del(struct file *file, const struct pagecache_untag_request *req)
{
	struct pcb_tag *tag;

	mutex_lock(&pcb_mutex);
	if (file)
		tag = pcb_tag_find(pcb_backing_inode(file));
	else
		tag = pcb_tag_lookup(MKDEV(req->dev_major, req->dev_minor), req->ino,
				     req->generation);
	if (tag)
		pcb_tag_remove(tag);
	mutex_unlock(&pcb_mutex);
	return tag ? 0 : -ENOENT;
}

/*
 * The first tag behind @seq, or NULL.  A list of n tags is read with n calls, so
 * the search starts where the last call stopped.
 */
struct pcb_tag *pcb_tag_after(u64 seq)
{
	static struct pcb_tag *hint; /* valid while the list has not changed since */
	static u64 hint_changes;
	struct pcb_tag *tag = NULL, *it;

	lockdep_assert_held(&pcb_mutex);
	if (hint && hint_changes == pcb_tag_changes && hint->seq == seq) {
		if (!list_is_last(&hint->list, &pcb_tags))
			tag = list_next_entry(hint, list);
	} else {
		list_for_each_entry (it, &pcb_tags, list) {
			if (it->seq > seq) {
				tag = it;
				break;
			}
		}
	}
	hint = tag;
	hint_changes = pcb_tag_changes;
	return tag;
}

/*
 * Forgets an inode that is being freed.  The generation is not compared: a file's owner can change
 * it.  @sight: which hook has seen its end.
 */
void notrace pcb_tags_forget(struct inode *inode, enum pcb_sight sight)
{
	struct pcb_tag *tag;

	rcu_read_lock();
	hlist_for_each_entry_rcu (tag, pcb_bucket(inode->i_sb->s_dev, inode->i_ino), hash) {
		if (READ_ONCE(tag->inode) == inode)
			WRITE_ONCE(tag->inode, NULL);
		if (tag->ino == inode->i_ino)
			pcb_saw(tag, sight);
	}
	rcu_read_unlock();
}

/* Forgets the inodes of all tags; no hook may set them any more. */
void pcb_tags_forget_inodes(void)
{
	struct pcb_tag *tag;

	lockdep_assert_held(&pcb_mutex);
	list_for_each_entry (tag, &pcb_tags, list)
		WRITE_ONCE(tag->inode, NULL);
}

/* Fills in the first tag behind rec->seq. */
int pcb_tag_next(struct pagecache_tag_record *rec)
{
	struct pcb_tag *tag = pcb_tag_after(rec->seq);

	lockdep_assert_held(&pcb_mutex);
	if (!tag)
		return -ENOENT;

	*rec = (struct pagecache_tag_record){
		.seq = tag->seq,
		.ino = tag->ino,
		.resident_pages = max_t(s64, atomic64_read(&tag->resident), 0),
		.dev_major = MAJOR(tag->dev),
		.dev_minor = MINOR(tag->dev),
		.generation = tag->generation,
		.model_id = tag->model->id,
		.active = !!rcu_access_pointer(tag->policy),
		.lent = READ_ONCE(tag->lent),
	};
	strscpy(rec->policy, tag->policy_name, sizeof(rec->policy));
	strscpy(rec->model, tag->model->name, sizeof(rec->model));
	strscpy(rec->path, tag->path, sizeof(rec->path));
	return 0;
}

u32 pcb_tag_count(void)
{
	return READ_ONCE(pcb_tag_total);
}

int pcb_tags_init(void)
{
	pcb_tag_table = kvcalloc(1UL << PCB_TAG_BITS, sizeof(*pcb_tag_table), GFP_KERNEL);
	return pcb_tag_table ? 0 : -ENOMEM;
}

/* A file system without a device is going, and its number with it. */
void pcb_tags_drop_device(dev_t dev)
{
	struct pcb_tag *tag, *next;

	mutex_lock(&pcb_mutex);
	list_for_each_entry_safe (tag, next, &pcb_tags, list) {
		if (tag->dev == dev)
			pcb_tag_remove(tag);
	}
	mutex_unlock(&pcb_mutex);
}

/* Removes all tags when the module is unloaded. */
void pcb_tags_clear(void)
{
	struct pcb_tag *tag, *next;

	mutex_lock(&pcb_mutex);
	list_for_each_entry_safe (tag, next, &pcb_tags, list)
		pcb_tag_remove(tag);
	mutex_unlock(&pcb_mutex);
}

/* Frees the table; no hook may run any more. */
void pcb_tags_free(void)
{
	kvfree(pcb_tag_table);
}
