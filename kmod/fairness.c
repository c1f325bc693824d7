// SPDX-License-Identifier: GPL-2.0-only
/*
 * fairness.c - whether reclaim can afford to keep what a policy wants kept.
 *
 * Each list of the kernel (of one cgroup and node) has an account of its own.  A page that is
 * reclaimed from it is a credit of PCB_KEEPS_PER_PAGE pages that may be kept; a page that is kept
 * is a debit.  A list may run a deficit of as many pages as it has file pages, so that those kept
 * are passed over once, wherever they lie.  A deficit halves every PCB_HALF_LIFE.  In the last
 * rounds of a reclaim that has gone all over the lists for nothing, one keep in PCB_LAST_SHARE, the
 * first among them, is refused: a failed reclaim may end in memory.low of others being taken, in an
 * OOM kill, or in kswapd giving up; one that got a single page is tried again.
 */
#include <linux/hash.h>
#include <linux/jiffies.h>
#include <linux/mmzone.h>
#include <linux/sched.h>
#include <linux/sizes.h>
#include <linux/tracepoint.h>

#include "fairness.h"
#include "hooks.h"

#define PCB_KEEPS_PER_PAGE 4
#define PCB_SMALL_DEFICIT (SZ_4M >> PAGE_SHIFT) /* that any list may run */
#define PCB_LAST_ROUNDS 1 /* priorities */
#define PCB_LAST_SHARE 64
#define PCB_HALF_LIFE (2 * HZ)
#define PCB_FORGET (HZ / 10) /* a reclaimer that has not been seen for that long */
#define PCB_FIRST_PRIORITY 12 /* DEF_PRIORITY of mm/internal.h */
#define PCB_ACCOUNT_BITS 8
#define PCB_RECLAIMER_BITS 9

/* The account of one list; lists whose addresses have the same hash share one. */
struct pcb_account {
	atomic_long_t deficit; /* pages */
	unsigned long since; /* when it was halved last */
};

/*
 * What is known of a task that reclaims.  Tasks that share one disturb each other for a batch of
 * folios; the accounts do not depend on that.
 */
struct pcb_reclaimer {
	unsigned long seen; /* jiffies at its last batch */
	struct pcb_account *account; /* of the list that the current batch comes from */
	int priority; /* of its last batch */
	unsigned int late; /* keeps wanted in the last rounds */
};

static struct pcb_account pcb_accounts[1 << PCB_ACCOUNT_BITS];
static struct pcb_reclaimer pcb_reclaimers[1 << PCB_RECLAIMER_BITS];
static struct tracepoint *pcb_tp_shrunk;

static struct pcb_reclaimer *pcb_reclaimer(void)
{
	return &pcb_reclaimers[hash_ptr(current, PCB_RECLAIMER_BITS)];
}

/* The current task, which reclaims from the list that @folio lies on. */
struct pcb_reclaimer *pcb_reclaimer_of_current(struct folio *folio, struct mem_cgroup *memcg)
{
	struct pcb_reclaimer *r = pcb_reclaimer();
	unsigned long list = (unsigned long)memcg + folio_nid(folio);

	WRITE_ONCE(r->account, &pcb_accounts[hash_long(list, PCB_ACCOUNT_BITS)]);
	return r;
}

/*
 * 12 when reclaim begins, 0 in its last try.  That of the batch before, which the kernel tells when
 * it is done; a task that has not been seen for a while begins anew.
 */
int pcb_reclaim_priority(const struct pcb_reclaimer *reclaimer)
{
	if (time_after(jiffies, READ_ONCE(reclaimer->seen) + PCB_FORGET))
		return PCB_FIRST_PRIORITY;
	return READ_ONCE(reclaimer->priority);
}

static long pcb_deficit(struct pcb_account *account)
{
	long pages = atomic_long_read(&account->deficit);
	unsigned long since = READ_ONCE(account->since);

	if (pages <= 0 || time_before(jiffies, since + PCB_HALF_LIFE))
		return pages;
	/* A second task in this race reads the old deficit, or halves what is left of it. */
	WRITE_ONCE(account->since, jiffies);
	if (time_after(jiffies, since + 16 * PCB_HALF_LIFE))
		atomic_long_set(&account->deficit, 0);
	else
		atomic_long_sub(pages / 2, &account->deficit);
	return pages / 2;
}

/*
 * File pages on the lists that this folio comes from.  The kernel's own sum is not exported; each
 * of the two kinds of lists counts for itself, and is empty while the other is in use.
 */
static long pcb_list_pages(struct folio *folio, struct mem_cgroup *memcg)
{
	struct pglist_data *node = NODE_DATA(folio_nid(folio));
	long pages = 0;

#ifdef CONFIG_MEMCG
	if (memcg) {
		struct mem_cgroup_per_node *mz = memcg->nodeinfo[folio_nid(folio)];

		for (int zone = 0; zone < MAX_NR_ZONES; zone++) {
			pages += READ_ONCE(mz->lru_zone_size[zone][LRU_INACTIVE_FILE]) +
				 READ_ONCE(mz->lru_zone_size[zone][LRU_ACTIVE_FILE]);
#ifdef CONFIG_LRU_GEN
			for (int gen = 0; gen < MAX_NR_GENS; gen++)
				pages += READ_ONCE(
					mz->lruvec.lrugen.nr_pages[gen][LRU_GEN_FILE][zone]);
#endif
		}
		return pages;
	}
#endif
	return atomic_long_read(&node->vm_stat[NR_INACTIVE_FILE]) +
	       atomic_long_read(&node->vm_stat[NR_ACTIVE_FILE]);
}

/* Whether reclaim can afford to keep this folio. */
bool pcb_reclaim_affords(struct pcb_reclaimer *reclaimer, struct folio *folio,
			 struct mem_cgroup *memcg)
{
	struct pcb_account *account = READ_ONCE(reclaimer->account);
	/* NULL: a task that shares the reclaimer has finished its batch meanwhile. */
	long deficit = account ? pcb_deficit(account) : 0;

	if (pcb_reclaim_priority(reclaimer) <= PCB_LAST_ROUNDS &&
	    reclaimer->late++ % PCB_LAST_SHARE == 0)
		return false;
	return deficit < PCB_SMALL_DEFICIT || deficit < pcb_list_pages(folio, memcg);
}

/* Reclaim has been told to keep @nr pages. */
void pcb_reclaim_kept(struct pcb_reclaimer *reclaimer, unsigned long nr)
{
	struct pcb_account *account = READ_ONCE(reclaimer->account);

	if (!account)
		return;
	if (!atomic_long_read(&account->deficit))
		WRITE_ONCE(account->since, jiffies);
	atomic_long_add(nr, &account->deficit);
}

/* A batch of folios has been tried.  In the task that reclaims. */
static void pcb_on_shrunk(void *data, int nid, unsigned long scanned, unsigned long reclaimed,
			  struct reclaim_stat *stat, int priority, int file)
{
	struct pcb_reclaimer *r = pcb_reclaimer();
	struct pcb_account *account = READ_ONCE(r->account);

	/* The next batch may come from another list: it has to name its account itself. */
	WRITE_ONCE(r->account, NULL);
	WRITE_ONCE(r->seen, jiffies);
	WRITE_ONCE(r->priority, priority);
	if (priority > PCB_LAST_ROUNDS)
		WRITE_ONCE(r->late, 0);
	if (!file || !account || !reclaimed || atomic_long_read(&account->deficit) <= 0)
		return;
	if (atomic_long_sub_return(reclaimed * PCB_KEEPS_PER_PAGE, &account->deficit) < 0)
		atomic_long_set(&account->deficit, 0);
}

int pcb_fairness_prepare(void)
{
	pcb_tp_shrunk =
		pcb_tracepoint("mm_vmscan_lru_shrink_inactive",
			       "void(pointer, int32, int64, int64, reclaim_stat *, int32, int32)");
	return pcb_tp_shrunk ? 0 : -ENOENT;
}

int pcb_fairness_on(void)
{
	int i;

	for (i = 0; i < ARRAY_SIZE(pcb_reclaimers); i++)
		pcb_reclaimers[i] = (struct pcb_reclaimer){ .priority = PCB_FIRST_PRIORITY };
	for (i = 0; i < ARRAY_SIZE(pcb_accounts); i++)
		atomic_long_set(&pcb_accounts[i].deficit, 0);
	return tracepoint_probe_register(pcb_tp_shrunk, pcb_on_shrunk, NULL);
}

void pcb_fairness_off(void)
{
	tracepoint_probe_unregister(pcb_tp_shrunk, pcb_on_shrunk, NULL);
	tracepoint_synchronize_unregister();
}
