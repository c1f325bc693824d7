/* SPDX-License-Identifier: GPL-2.0-only */
/* pagecache.h - what the files of the module know of each other. */
#ifndef PAGECACHE_H
#define PAGECACHE_H

#undef pr_fmt /* printk.h may have come first */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/atomic.h>
#include <linux/fs.h>
#include <linux/ftrace.h>
#include <linux/hash.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/pagemap.h>
#include <linux/percpu-refcount.h>
#include <linux/rcupdate.h>
#include <linux/workqueue.h>

#include "pagecache_ops.h"

/* Bounds that no policy can exceed; parameters of the module. */
extern unsigned int pcb_max_answer_mib;
extern unsigned int pcb_max_extent_mib;
extern unsigned int pcb_max_inflight_mib;
extern unsigned int pcb_workers;
extern unsigned int pcb_max_invalid;
extern unsigned int pcb_max_keep_percent;
extern unsigned int pcb_max_evict_us;

static inline unsigned long pcb_mib_to_pages(unsigned int mib)
{
	return (unsigned long)mib << (20 - PAGE_SHIFT);
}

/* One submission to the file system: what force_page_cache_ra() uses, too. */
#define PCB_CHUNK_PAGES ((2UL << 20) >> PAGE_SHIFT)

#define PCB_CHARGED 8

/*
 * A policy lives from its attachment until its link is released.  @ops is what hooks
 * call; it turns NULL as soon as the policy has ended, whatever the reason, and is
 * read under RCU.  The memory outlives that for work in flight (kref).
 */
struct pcb_policy {
	struct list_head list; /* pcb_policies, under pcb_mutex */
	struct kref ref;
	struct rcu_head rcu;
	struct pagecache_ops __rcu *ops;
	struct pagecache_ops *kdata; /* valid until unreg */
	u64 __percpu *counters;
	u64 seq;
	u64 attached_ns;
	u32 hooks; /* bit per enum pagecache_hook */
	atomic_t tags;
	atomic_t invalid;
	atomic64_t governed; /* pages in the cache */
	atomic64_t inflight; /* pages queued for prefetch */
	atomic64_t kept; /* pages in the cache that it keeps from being evicted */
	u64 keep_max; /* bound of kept */
	u64 evict_ns, pressure_ns; /* running averages of what a call takes */
	u64 charged[PCB_CHARGED]; /* ids of memory cgroups that its pages are charged to */
	bool charged_all; /* too many to list */
	unsigned long ended; /* bit 0: the record is being or has been written */
	struct pagecache_exit_record record;
	struct work_struct end_work;
	char name[PAGECACHE_NAME_LEN];
};

struct pcb_model {
	struct list_head list;
	unsigned int refs;
	u32 id;
	char name[PAGECACHE_MODEL_LEN];
};

/*
 * Which pages of a file its policy keeps: a bit each, set when a keep is honoured, cleared when the
 * page leaves the cache or the policy changes its mind.  Belongs to one pair of tag and policy.
 */
struct pcb_kept {
	struct rcu_head rcu;
	struct pcb_policy *policy;
	atomic64_t count;
	unsigned long pages;
	unsigned long bits[];
};

#define PCB_NO_ACCESS (~0ULL)

/*
 * A tag names a file by (device, inode, generation) and holds no reference to it: the
 * file can be deleted, the file system unmounted.  Found under RCU from an inode.
 */
struct pcb_tag {
	struct hlist_node hash;
	struct list_head list; /* pcb_tags, by seq, under pcb_mutex */
	struct rcu_head rcu;
	struct pcb_policy __rcu *policy; /* NULL: its policy is not attached */
	struct pcb_model *model;
	u64 seq;
	u64 ino;
	dev_t dev;
	u32 generation;
	u64 access_end; /* end of the last range told to the access hook, or PCB_NO_ACCESS */
	atomic64_t resident;
	u64 pages; /* size of the file when it was tagged */
	struct pcb_kept __rcu *kept; /* NULL: its policy has no evict hook */
	struct inode *inode; /* read under RCU; see hooks_pressure.c */
	char policy_name[PAGECACHE_NAME_LEN];
	char path[];
};

/*
 * One call of a hook.  The policy sees @ctx only; kfuncs find the rest from it, so that
 * a policy cannot name a file other than the one it is asked about.
 */
struct pcb_call {
	struct pagecache_ctx ctx;
	struct file *file; /* NULL where the hook has none */
	struct pcb_policy *policy;
	struct pcb_drops *drops; /* where pressure's drops go */
	enum pagecache_hook hook;
};

/* What a pressure hook wants dropped of one file. */
struct pcb_drops {
	unsigned int nr;
	struct {
		pgoff_t start;
		pgoff_t end;
	} at[64];
};

extern struct mutex pcb_mutex; /* policies, tags, models, exit records */
extern struct list_head pcb_policies;
extern struct workqueue_struct *pcb_wq; /* ends of policies */

/* policy.c */
int pcb_policy_register(void);
void pcb_policy_put(struct pcb_policy *p);
struct pcb_policy *pcb_policy_find(const char *name);
void pcb_policy_end(struct pcb_policy *p, enum pagecache_exit_kind kind, s64 code,
		    enum pagecache_hook hook, const char *reason, const char *message);
void pcb_policy_counters(struct pcb_policy *p, u64 *out);
void pcb_policy_invalid(struct pcb_policy *p, enum pagecache_hook hook, const char *what);
void pcb_policy_took(struct pcb_policy *p, enum pagecache_hook hook, u64 since_ns);

static inline void pcb_count_add(struct pcb_policy *p, enum pagecache_counter c, u64 n)
{
	this_cpu_add(p->counters[c], n);
}

#define pcb_count(p, name, n) pcb_count_add(p, PAGECACHE_COUNTER_##name, n)

/* exits.c */
void pcb_exit_push(struct pagecache_exit_record *record);
int pcb_exit_next(struct pagecache_exit_record *record);

/* kfuncs.c */
int pcb_kfuncs_register(void);

/* tags.c */
int pcb_tags_init(void);
void pcb_tags_free(void);
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

struct pcb_tag *pcb_tag_find(const struct inode *inode); /* under RCU */
int pcb_tag_add(struct file *file, const struct pagecache_tag_request *req);
int pcb_tag_del(struct file *file, const struct pagecache_untag_request *req);
int pcb_tag_next(struct pagecache_tag_record *rec);
u32 pcb_tag_count(void);
void pcb_tags_bind(struct pcb_policy *p);
void pcb_tags_unbind(struct pcb_policy *p);
struct pcb_tag *pcb_tag_after(u64 seq);
void pcb_tags_forget(struct inode *inode);
void pcb_tags_forget_inodes(void);

/* keep.c */
u64 pcb_max_keep_pages(void);
u64 pcb_keep_budget(struct pcb_policy *p, u64 pages);
struct pcb_kept *pcb_kept_new(struct pcb_policy *p, u64 pages);
void pcb_kept_free(struct pcb_kept *kept);
bool pcb_kept_has(const struct pcb_kept *kept, pgoff_t index);
bool pcb_kept_add(struct pcb_kept *kept, pgoff_t index, unsigned long nr);
void pcb_kept_del(struct pcb_kept *kept, pgoff_t index, unsigned long nr);

/* call.c */
void pcb_call_init(struct pcb_call *call, struct pcb_policy *p, const struct pcb_tag *tag,
		   enum pagecache_hook hook, struct address_space *mapping, struct file *file,
		   pgoff_t index, unsigned long nr);

/* symbols.c: kernel functions that are not exported */
int pcb_symbols_init(void);
unsigned long pcb_symbol(const char *name); /* 0: not there */
bool pcb_symbol_range(const char *name, unsigned long *start, unsigned long *end);

/* hooks.c: on while at least one policy is attached */
int pcb_hooks_prepare(void);
void pcb_hooks_release(void);
int pcb_hooks_get(u32 wanted, const char **failed);
void pcb_hooks_put(u32 wanted);
u32 pcb_hooks_available(void);

/*
 * A family of hooks that are attached together.  prepare finds what it needs when the module
 * is loaded; on and off follow the policies; release is the module's end.
 */
struct pcb_hook_family {
	const char *name;
	u32 hooks; /* wanted by policies with one of these; 0: by every policy */
	int (*prepare)(void);
	int (*on)(const char **failed);
	void (*off)(void);
	void (*release)(void);
	unsigned int users;
};

extern struct pcb_hook_family pcb_readahead_hooks; /* hooks_readahead.c */
extern struct pcb_hook_family pcb_access_hooks; /* hooks_access.c */
extern struct pcb_hook_family pcb_cache_hooks; /* hooks_cache.c */
extern struct pcb_hook_family pcb_umount_hooks; /* hooks_umount.c */
extern struct pcb_hook_family pcb_evict_hooks; /* hooks_evict.c */
extern struct pcb_hook_family pcb_pressure_hooks; /* hooks_pressure.c */

extern bool pcb_evict_possible, pcb_pressure_possible; /* on this kernel */
extern bool pcb_pressure_live;
void pcb_pressure_added(struct pcb_policy *p, struct pcb_tag *tag, struct folio *folio);

/* ftrace.c: a set of kernel functions that are watched or redirected together */
struct pcb_ftrace {
	const char *name;
	unsigned long addr;
	struct ftrace_ops ops;
};

int pcb_ftrace_prepare(struct pcb_ftrace *set, int n);
int pcb_ftrace_on(struct pcb_ftrace *set, int n);
void pcb_ftrace_off(struct pcb_ftrace *set, int n);
void pcb_ftrace_release(struct pcb_ftrace *set, int n);

/* direct.c: folio_referenced() leads to pcb_folio_referenced() by a direct call */
int pcb_direct_prepare(unsigned long function);
int pcb_direct_on(void);
void pcb_direct_off(void);
void pcb_direct_release(void);

/* What we hand on as is_locked when we ask ourselves: reclaim says 1. */
#define PCB_LOCKED_OURS 2

/* Whether it is reclaim that asks, and about a folio of a file that may be tagged. */
static __always_inline bool pcb_reclaim_asks(const struct folio *folio, int is_locked)
{
	const struct address_space *mapping = READ_ONCE(folio->mapping);

	/* The low bits: anonymous memory. */
	return is_locked == 1 && mapping && !((unsigned long)mapping & 3) && mapping->host &&
	       pcb_tag_possible(mapping->host);
}

/* hooks_evict.c */
int pcb_folio_referenced(struct folio *folio, int is_locked, struct mem_cgroup *target,
			 unsigned long *vm_flags);

void pcb_readahead_issue(struct file *file, struct address_space *mapping, pgoff_t start,
			 unsigned long nr, pgoff_t mark, unsigned int order);

/*
 * A task whose instruction pointer was moved into the module may sleep there.  The
 * reference is taken before the move, and dropped as the last act of our function;
 * unloading waits for all of them (main.c).
 */
extern struct percpu_ref pcb_active;

/* prefetch.c */
int pcb_prefetch_start(void);
void pcb_prefetch_stop(void);
s64 pcb_prefetch_queue(struct pcb_call *call, pgoff_t start, u64 nr, s32 node, u32 mark_step);
u64 pcb_drop_now(struct address_space *mapping, pgoff_t start, pgoff_t end);
s64 pcb_drop_queue(struct pcb_call *call, pgoff_t start, u64 nr);
s64 pcb_prefetch_cancel_file(struct file *file);
void pcb_prefetch_cancel_policy(struct pcb_policy *p);
void pcb_prefetch_drain_sb(struct super_block *sb);
bool pcb_node_known(s32 node);
void pcb_read_on_node(struct pcb_policy *p, struct file *file, pgoff_t start, unsigned long nr,
		      pgoff_t mark, unsigned int order, s32 node);

/* control.c */
int pcb_control_init(void);
void pcb_control_exit(void);

#endif /* PAGECACHE_H */
