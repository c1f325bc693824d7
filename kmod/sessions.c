// SPDX-License-Identifier: GPL-2.0-only
/* sessions.c - who lends which files, and how they are found by policies. */
#include <linux/cred.h>
#include <linux/dcache.h>
#include <linux/file.h>
#include <linux/hashtable.h>
#include <linux/kdev_t.h>
#include <linux/slab.h>

#include "sessions.h"
#include "streams.h"

struct pcb_session {
	struct list_head loans; /* in the order in which they were lent, under pcb_lock */
};

struct pcb_loan {
	struct hlist_node hash;
	struct list_head list;
	struct pcb_session *session;
	struct file *file; /* the session's own */
	struct inode *inode; /* the file holds it */
};

static DEFINE_HASHTABLE(pcb_loans, 10); /* under pcb_lock */
static u32 pcb_lent; /* in all sessions, under pcb_lock */

static u64 pcb_loan_hash(dev_t dev, u64 ino)
{
	return ino ^ ((u64)dev << 40);
}

struct pcb_session *pcb_session_new(void)
{
	struct pcb_session *session = kzalloc(sizeof(*session), GFP_KERNEL);

	if (session)
		INIT_LIST_HEAD(&session->loans);
	return session;
}

u32 pcb_lent_count(void)
{
	return READ_ONCE(pcb_lent);
}

static struct pcb_loan *pcb_loan_find(const struct pcb_session *session, const struct inode *inode)
{
	u64 key = pcb_loan_hash(inode->i_sb->s_dev, inode->i_ino);
	struct pcb_loan *loan;

	lockdep_assert_held(&pcb_lock);
	hash_for_each_possible (pcb_loans, loan, hash, key) {
		if (loan->session == session && loan->inode == inode)
			return loan;
	}
	return NULL;
}

/* How often a file is lent now. */
u32 pcb_lent_times(const struct inode *inode)
{
	u64 key = pcb_loan_hash(inode->i_sb->s_dev, inode->i_ino);
	struct pcb_loan *loan;
	u32 times = 0;

	spin_lock(&pcb_lock);
	hash_for_each_possible (pcb_loans, loan, hash, key)
		times += loan->inode == inode;
	spin_unlock(&pcb_lock);
	return times;
}

/* The file's tag, if it has one, tells its hooks that it is lent. */
static bool pcb_tag_note_lent(const struct inode *inode)
{
	struct pcb_tag *tag;

	lockdep_assert_held(&pcb_mutex);
	tag = pcb_tag_find(inode);
	if (tag)
		WRITE_ONCE(tag->lent, pcb_lent_times(inode));
	return tag;
}

static int pcb_loan_add(struct pcb_session *session, struct pcb_loan *loan)
{
	int err = 0;

	spin_lock(&pcb_lock);
	if (pcb_loan_find(session, loan->inode))
		err = -EEXIST;
	else if (pcb_lent >= pcb_max_lent)
		err = -ENOSPC;
	if (!err) {
		hash_add(pcb_loans, &loan->hash,
			 pcb_loan_hash(loan->inode->i_sb->s_dev, loan->inode->i_ino));
		list_add_tail(&loan->list, &session->loans);
		WRITE_ONCE(pcb_lent, pcb_lent + 1);
	}
	spin_unlock(&pcb_lock);
	return err;
}

/* Moves a loan to a list of those that nobody finds any more. */
static void pcb_loan_del(struct pcb_loan *loan, struct list_head *gone)
{
	lockdep_assert_held(&pcb_lock);
	hash_del(&loan->hash);
	list_move_tail(&loan->list, gone);
	WRITE_ONCE(pcb_lent, pcb_lent - 1);
}

static bool pcb_loans_held(const struct list_head *gone)
{
	struct pcb_loan *loan;
	bool held = false;

	list_for_each_entry (loan, gone, list)
		held |= pcb_file_held(loan->file);
	return held;
}

/*
 * Lets go of files: what is queued is cancelled, and what is being submitted is waited for
 * (milliseconds), so that an unmount finds nothing of ours.  A file system that does not answer
 * gets its references back when it does.
 */
static void pcb_loans_end(struct list_head *gone)
{
	struct pcb_loan *loan, *next;

	if (list_empty(gone))
		return;
	wait_event_timeout(pcb_progress, !pcb_loans_held(gone), PCB_DRAIN_TIMEOUT);
	mutex_lock(&pcb_mutex);
	list_for_each_entry (loan, gone, list)
		pcb_tag_note_lent(loan->inode);
	mutex_unlock(&pcb_mutex);
	list_for_each_entry_safe (loan, next, gone, list) {
		fput(loan->file);
		kfree(loan);
	}
}

/*
 * Returns 0, -EBADF (not open for reading), -EINVAL (not a regular file), -EOPNOTSUPP (its pages
 * are another file's: overlayfs), -ENOENT (not tagged), -EEXIST (lent in this session already),
 * -ENOSPC (too many are), -ENOMEM, or why it cannot be opened once more.
 */
int pcb_session_lend(struct pcb_session *session, struct file *file)
{
	struct pcb_loan *loan;
	int err;

	if (!(file->f_mode & FMODE_READ))
		return -EBADF;
	if (!S_ISREG(file_inode(file)->i_mode))
		return -EINVAL;
	if (file_inode(file) != d_real_inode(file->f_path.dentry))
		return -EOPNOTSUPP;
	loan = kzalloc(sizeof(*loan), GFP_KERNEL);
	if (!loan)
		return -ENOMEM;
	loan->session = session;
	loan->inode = file_inode(file);
	loan->file = dentry_open(&file->f_path, O_RDONLY | O_LARGEFILE, file->f_cred);
	if (IS_ERR(loan->file)) {
		err = PTR_ERR(loan->file);
		kfree(loan);
		return err;
	}
	mutex_lock(&pcb_mutex);
	err = pcb_tag_find(loan->inode) ? pcb_loan_add(session, loan) : -ENOENT;
	if (!err)
		pcb_tag_note_lent(loan->inode);
	mutex_unlock(&pcb_mutex);
	if (err) {
		fput(loan->file);
		kfree(loan);
	}
	return err;
}

/* Returns 0, or -ENOENT: this session has not lent it. */
int pcb_session_take_back(struct pcb_session *session, struct file *file)
{
	struct pcb_loan *loan;
	LIST_HEAD(gone);

	spin_lock(&pcb_lock);
	loan = pcb_loan_find(session, file_inode(file));
	if (loan)
		pcb_loan_del(loan, &gone);
	spin_unlock(&pcb_lock);
	pcb_loans_end(&gone);
	return loan ? 0 : -ENOENT;
}

/* The control device has been closed: by its owner, or for one that was killed. */
void pcb_session_end(struct pcb_session *session)
{
	struct pcb_loan *loan, *next;
	LIST_HEAD(gone);

	spin_lock(&pcb_lock);
	list_for_each_entry_safe (loan, next, &session->loans, list)
		pcb_loan_del(loan, &gone);
	spin_unlock(&pcb_lock);
	pcb_loans_end(&gone);
	kfree(session);
}

/* Whether a policy may have pages of a lent file read or dropped: it governs the file. */
static bool pcb_loan_governed(const struct pcb_loan *loan, const struct pcb_policy *p,
			      const u32 *model)
{
	struct pcb_governance by;
	bool governed;

	rcu_read_lock();
	by = pcb_governance_of(loan->inode->i_mapping);
	governed = by.policy == p && (!model || by.tag->model->id == *model);
	rcu_read_unlock();
	return governed && READ_ONCE(loan->inode->i_nlink);
}

/* The open file to read for a policy that names a file, or NULL; valid under pcb_lock. */
struct file *pcb_lent_file(const struct pcb_policy *p, const struct pagecache_file_key *key)
{
	dev_t dev = MKDEV(key->dev_major, key->dev_minor);
	struct pcb_loan *loan;

	lockdep_assert_held(&pcb_lock);
	hash_for_each_possible (pcb_loans, loan, hash, pcb_loan_hash(dev, key->ino)) {
		if (loan->inode->i_ino == key->ino && loan->inode->i_sb->s_dev == dev &&
		    loan->inode->i_generation == key->generation &&
		    pcb_loan_governed(loan, p, NULL))
			return loan->file;
	}
	return NULL;
}

/*
 * The open file that was lent after the one of the call, if it is of the same model and policy;
 * else NULL.  Valid under pcb_lock.
 */
struct file *pcb_lent_next(const struct pcb_call *call)
{
	const struct inode *inode = call->file->f_mapping->host;
	struct pcb_loan *loan, *next;

	lockdep_assert_held(&pcb_lock);
	hash_for_each_possible (pcb_loans, loan, hash,
				pcb_loan_hash(inode->i_sb->s_dev, inode->i_ino)) {
		if (loan->inode != inode || list_is_last(&loan->list, &loan->session->loans))
			continue;
		next = list_next_entry(loan, list);
		if (pcb_loan_governed(next, call->policy, &call->ctx.model))
			return next->file;
	}
	return NULL;
}
