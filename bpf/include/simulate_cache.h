/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * simulate_cache.h - a model of the page cache that asks a policy as the kernel does.
 *
 * Two orders: SIM_LRU is the textbook's one list; SIM_KERNEL has the two lists of mm/vmscan.c
 * with its referenced bit, its balance and its refault distances (mm/swap.c, mm/workingset.c of
 * Linux 6.12).  Reclaim takes folios from the end of the inactive list and asks `evict` about
 * each; what is kept goes to the active list; who keeps everything loses.
 *
 * What is not there: the kernel's own readahead (a miss reads what is wanted, unless a policy
 * answers otherwise), mappings, dirty pages, several CPUs, and time that reading takes: what is
 * prefetched arrives at once, what is dropped goes when the access is over.
 */
#ifndef SIMULATE_CACHE_H
#define SIMULATE_CACHE_H

#include "misses_only.bpf.h"

#define SIM_BATCH 32 /* SWAP_CLUSTER_MAX */
#define SIM_NONE 0xffffffffU
#define SIM_QUEUE 1024

enum { SIM_KERNEL = 0, SIM_LRU = 1 };
/* What is noted by part of a file, in bytes; simulate/replay_recording.py has the same. */
enum {
	SIM_NOTE_HIT,
	SIM_NOTE_USEFUL,
	SIM_NOTE_MISS,
	SIM_NOTE_PREFETCHED,
	SIM_NOTE_READ,
	SIM_NOTE_RECLAIMED,
	SIM_NOTE_DROPPED,
	SIM_NOTE_WASTED,
	SIM_NOTES,
};
enum { SIM_OUT, SIM_INACTIVE, SIM_ACTIVE, SIM_LISTS };
enum { SIM_REFERENCED = 1, SIM_UNUSED = 2, SIM_MARK = 4, SIM_KEPT = 8, SIM_WORKINGSET = 16 };

struct sim_event {
	u64 time_ns;
	u64 offset;
	u64 length;
	u64 cgroup_id;
	u32 file;
	u32 tgid;
	u32 kind; /* enum pagecache_kind */
	u32 reserved;
};

/* Bytes unless said otherwise; pagecache_bpf/simulate/simulator.py has the same. */
struct sim_totals {
	u64 wanted;
	u64 hit; /* resident since an earlier use */
	u64 ahead; /* resident because it was read ahead for this use */
	u64 missed;
	u64 read; /* from the device, what was read ahead included */
	u64 reread; /* of these: had been read before */
	u64 unused; /* of these: left the cache without having been used */
	u64 evicted;
	u64 dropped; /* on the policy's request */
	u64 peak; /* most bytes resident at a time */
	u64 asked; /* answers of evict, calls */
	u64 kept;
	u64 now;
	u64 keep_ignored; /* evicted in spite of it */
	u64 invalid;
};

struct sim_page {
	u32 newer;
	u32 older;
	u32 file;
	u8 list;
	u8 flags;
	u8 seen;
	u8 reserved;
	u64 gone_at; /* the clock of refaults when it was evicted */
	u64 cgroup_id;
};

struct sim_file {
	u64 bytes;
	u64 pages;
	u64 first; /* its first page among all */
	u64 first_cell; /* its first part among all */
	u64 resident;
	u64 next; /* where the last access ended */
	u64 quiet; /* pages read in order since the access hook was called */
	u32 model;
	u32 governed;
};

struct sim_wish {
	u64 start;
	u64 nr;
	u32 file;
	u32 step;
};

static struct {
	const struct pagecache_ops *ops;
	struct sim_page *pages;
	struct sim_file *files;
	u64 *notes; /* SIM_NOTES for each part of each file; NULL: nobody asked */
	u64 cell_pages;
	u64 nr_pages;
	u64 capacity;
	u64 count[SIM_LISTS];
	u64 governed;
	u64 kept;
	u64 keep_max;
	bool lent; /* all files are lent in their order, as in a session of engine struct_ops */
	bool all_kept; /* the last page that went had to: every page was to be kept */
	u64 age;
	u64 now_ns;
	u64 cgroup_id;
	u64 *parents; /* of cgroups, by id less 1; 0: there is none */
	u64 random;
	u32 nr_files;
	u32 shift;
	u32 order;
	u32 tgid;
	u32 head[SIM_LISTS];
	u32 tail[SIM_LISTS];
	u32 nr_prefetches;
	u32 nr_drops;
	s64 exit_code;
	const char *exit_message;
	struct sim_wish prefetches[SIM_QUEUE];
	struct sim_wish drops[SIM_QUEUE];
	struct sim_totals totals;
} sim;

static const struct pagecache_ops sim_no_policy;

static inline u64 sim_parent(u64 cgroup)
{
	return sim.parents && cgroup ? sim.parents[cgroup - 1] : 0;
}

/* The reader's control group, or the one above it, that lies so many levels below the root. */
static inline u64 sim_ancestor(s32 level)
{
	u64 at, cgroup = sim.cgroup_id;
	s32 depth = 0;

	for (at = cgroup; at; at = sim_parent(at))
		depth++;
	for (; depth > level; depth--)
		cgroup = sim_parent(cgroup);
	return depth == level ? cgroup : 0;
}

static inline u32 sim_random(void)
{
	sim.random ^= sim.random << 13;
	sim.random ^= sim.random >> 7;
	sim.random ^= sim.random << 17;
	return sim.random >> 32;
}

static inline struct pagecache_ctx sim_ctx(u32 file, u64 index, u64 nr, u32 kind)
{
	struct sim_file *f = &sim.files[file];

	return (struct pagecache_ctx){
		.ino = file + 1,
		.file_id = (u64)sim.tgid << 32 | file,
		.index = index,
		.nr = nr,
		.file_pages = f->pages,
		.resident_pages = f->resident,
		.governed_pages = sim.governed,
		.time_ns = sim.now_ns,
		.cgroup_id = sim.cgroup_id,
		.dev_major = 8,
		.model = f->model,
		.kind = kind,
		.tgid = sim.tgid,
		.tid = sim.tgid,
		.ra_pages = (128 << 10) >> sim.shift,
		.io_pages = (1 << 20) >> sim.shift,
		.page_shift = sim.shift,
		.kept_pages = sim.kept,
		.keep_max_pages = sim.keep_max,
		.priority = 12,
	};
}

/* --- what policies call --- */

static inline s64 sim_wish(struct sim_wish *queue, u32 *nr_queued, struct pagecache_ctx *ctx,
			   u64 start, u64 nr, u32 step)
{
	if (start >= ctx->file_pages || !nr)
		return -22; /* EINVAL */
	if (*nr_queued == SIM_QUEUE)
		return -28; /* ENOSPC */
	if (nr > ctx->file_pages - start)
		nr = ctx->file_pages - start;
	queue[(*nr_queued)++] = (struct sim_wish){ start, nr, (u32)ctx->ino - 1, step };
	return nr;
}

static inline s64 pagecache_prefetch(struct pagecache_ctx *ctx, u64 start, u64 nr, s32 node,
				     u32 mark_step)
{
	return sim_wish(sim.prefetches, &sim.nr_prefetches, ctx, start, nr, mark_step);
}

static inline s64 pagecache_drop(struct pagecache_ctx *ctx, u64 start, u64 nr)
{
	return sim_wish(sim.drops, &sim.nr_drops, ctx, start, nr, 0);
}

/* Policies are simulated as on engine struct_ops, without a session unless sim_lend() was called.
 */
static inline bool pagecache_names_files(const struct pagecache_ctx *ctx)
{
	return sim.lent;
}

/* Here, as with engine agent, any governed file can be named. */
static inline s64 pagecache_prefetch_file(struct pagecache_ctx *ctx,
					  const struct pagecache_file_key *file, u64 pages,
					  u64 start, u64 nr, s32 node)
{
	struct pagecache_ctx other = { .ino = file->ino, .file_pages = pages };

	if (!file->ino || file->ino > sim.nr_files)
		return -2; /* ENOENT */
	return sim_wish(sim.prefetches, &sim.nr_prefetches, &other, start, nr, 0);
}

static inline s64 pagecache_drop_file(struct pagecache_ctx *ctx,
				      const struct pagecache_file_key *file, u64 pages, u64 start,
				      u64 nr)
{
	struct pagecache_ctx other = { .ino = file->ino, .file_pages = pages };

	if (!file->ino || file->ino > sim.nr_files)
		return -2;
	return sim_wish(sim.drops, &sim.nr_drops, &other, start, nr, 0);
}

static inline u64 pagecache_next_file(struct pagecache_ctx *ctx, struct pagecache_file_key *next)
{
	u64 number = ctx->ino; /* inodes count from 1 */

	*next = (struct pagecache_file_key){};
	if (!sim.lent || number >= sim.nr_files || !sim.files[number].governed ||
	    sim.files[number].model != ctx->model)
		return 0;
	*next = (struct pagecache_file_key){ .ino = number + 1, .dev_major = ctx->dev_major };
	return sim.files[number].pages;
}

static inline s64 pagecache_prefetch_next(struct pagecache_ctx *ctx, u64 start, u64 nr, s32 node,
					  u32 mark_step)
{
	struct pagecache_file_key next;
	struct pagecache_ctx other = { .file_pages = pagecache_next_file(ctx, &next) };

	if (!other.file_pages)
		return PAGECACHE_NOT_LENT;
	other.ino = next.ino;
	return sim_wish(sim.prefetches, &sim.nr_prefetches, &other, start, nr, mark_step);
}

static inline u64 pagecache_allowed_ahead(const struct pagecache_ctx *ctx)
{
	return ~0ULL;
}

static inline s64 pagecache_cancel(struct pagecache_ctx *ctx)
{
	s64 pages = 0;

	for (u32 i = 0; i < sim.nr_prefetches; i++)
		if (sim.prefetches[i].file == (u32)ctx->ino - 1) {
			pages += sim.prefetches[i].nr;
			sim.prefetches[i].nr = 0;
		}
	return pages;
}

static inline s64 pagecache_keep_budget(struct pagecache_ctx *ctx, u64 pages)
{
	sim.keep_max = pages < sim.capacity ? pages : sim.capacity;
	return sim.keep_max;
}

static inline void pagecache_exit(struct pagecache_ctx *ctx, s64 code, const char *message)
{
	sim.exit_code = code;
	sim.exit_message = message;
	sim.ops = &sim_no_policy;
}

/* --- lists --- */

static inline void sim_take(u32 p)
{
	struct sim_page *page = &sim.pages[p];
	u32 list = page->list;

	*(page->newer != SIM_NONE ? &sim.pages[page->newer].older : &sim.head[list]) = page->older;
	*(page->older != SIM_NONE ? &sim.pages[page->older].newer : &sim.tail[list]) = page->newer;
	sim.count[list]--;
}

static inline void sim_put(u32 p, u32 list)
{
	struct sim_page *page = &sim.pages[p];

	page->list = list;
	page->newer = SIM_NONE;
	page->older = sim.head[list];
	*(page->older != SIM_NONE ? &sim.pages[page->older].newer : &sim.tail[list]) = p;
	sim.head[list] = p;
	sim.count[list]++;
}

static inline u64 sim_resident(void)
{
	return sim.count[SIM_INACTIVE] + sim.count[SIM_ACTIVE];
}

/* Add to what is noted of the part of a file that a page lies in. */
static inline void sim_note(u32 p, u32 what, u64 bytes)
{
	const struct sim_file *f = &sim.files[sim.pages[p].file];

	if (sim.notes)
		sim.notes[(f->first_cell + (p - f->first) / sim.cell_pages) * SIM_NOTES + what] +=
			bytes;
}

/* --- leaving the cache --- */

static inline void sim_told(bool added, u32 p)
{
	struct sim_page *page = &sim.pages[p];
	struct sim_file *f = &sim.files[page->file];
	struct pagecache_ctx ctx;

	f->resident += added ? 1 : -1;
	if (!f->governed)
		return;
	sim.governed += added ? 1 : -1;
	ctx = sim_ctx(page->file, p - f->first, 1, PAGECACHE_KIND_NONE);
	if (added && sim.ops->added)
		sim.ops->added(&ctx);
	else if (!added && sim.ops->removed)
		sim.ops->removed(&ctx);
}

static inline void sim_remove(u32 p, bool evicted)
{
	struct sim_page *page = &sim.pages[p];
	u64 bytes = 1ULL << sim.shift;

	sim_take(p);
	page->list = SIM_OUT;
	page->gone_at = evicted ? ++sim.age : 0;
	if (page->flags & SIM_UNUSED) {
		sim.totals.unused += bytes;
		sim_note(p, SIM_NOTE_WASTED, bytes);
	}
	sim_note(p, evicted ? SIM_NOTE_RECLAIMED : SIM_NOTE_DROPPED, bytes);
	if (page->flags & SIM_KEPT)
		sim.kept--;
	page->flags = 0;
	*(evicted ? &sim.totals.evicted : &sim.totals.dropped) += bytes;
	sim_told(false, p);
}

static inline void sim_run_drops(void)
{
	for (u32 i = 0; i < sim.nr_drops; i++) {
		struct sim_wish wish = sim.drops[i];

		for (u64 index = wish.start; index < wish.start + wish.nr; index++) {
			u32 p = sim.files[wish.file].first + index;

			if (sim.pages[p].list)
				sim_remove(p, false);
		}
	}
	sim.nr_drops = 0;
}

/* As mm/vmscan.c:inactive_is_low(): the active list may be larger the more memory there is. */
static inline bool sim_inactive_is_low(void)
{
	u64 gib = (sim_resident() << sim.shift) >> 30, ratio = 1;

	while (gib && (ratio + 1) * (ratio + 1) <= 10 * gib)
		ratio++;
	return sim.count[SIM_INACTIVE] * ratio < sim.count[SIM_ACTIVE];
}

static inline s32 sim_ask(u32 p)
{
	struct sim_page *page = &sim.pages[p];
	struct pagecache_ctx ctx;
	s32 verdict;

	if (!sim.ops->evict || !sim.files[page->file].governed)
		return PAGECACHE_EVICT_DEFAULT;
	ctx = sim_ctx(page->file, p - sim.files[page->file].first, 1, PAGECACHE_KIND_CGROUP);
	ctx.cgroup_id = page->cgroup_id;
	if (page->flags & SIM_REFERENCED)
		ctx.flags |= PAGECACHE_F_REFERENCED;
	if (page->flags & SIM_WORKINGSET)
		ctx.flags |= PAGECACHE_F_WORKINGSET;
	if (page->flags & SIM_KEPT)
		ctx.flags |= PAGECACHE_F_KEPT;
	sim.totals.asked++;
	verdict = sim.ops->evict(&ctx);
	if (verdict == PAGECACHE_EVICT_KEEP)
		sim.totals.kept++;
	else if (verdict == PAGECACHE_EVICT_NOW)
		sim.totals.now++;
	else if (verdict != PAGECACHE_EVICT_DEFAULT)
		sim.totals.invalid++;
	return verdict;
}

/* Ask for extents to drop first: once for each governed file, then once more. */
static inline void sim_press(void)
{
	struct pagecache_pressure want = { .files = sim.nr_files };
	u64 goal = sim_resident() - SIM_BATCH;
	struct pagecache_ctx ctx;

	if (!sim.ops->pressure || sim_resident() <= SIM_BATCH)
		return;
	for (; want.round < 2; want.round++)
		for (u32 file = 0; file < sim.nr_files; file++) {
			if (!sim.files[file].governed || !sim.files[file].resident)
				continue;
			if (sim_resident() <= goal)
				return;
			want.pages = sim_resident() - goal;
			ctx = sim_ctx(file, 0, want.pages, PAGECACHE_KIND_CGROUP);
			sim.ops->pressure(&ctx, &want);
			sim_run_drops();
		}
}

/* Whether a keep is within the bound that the policy has set itself. */
static inline bool sim_keep(u32 p)
{
	struct sim_page *page = &sim.pages[p];

	if (!(page->flags & SIM_KEPT)) {
		if (sim.kept >= sim.keep_max) {
			sim.totals.keep_ignored++;
			return false;
		}
		page->flags |= SIM_KEPT;
		sim.kept++;
	}
	return true;
}

static inline void sim_make_room(void)
{
	u64 scanned = 0;
	u32 p;

	if (sim_resident() >= sim.capacity)
		sim_press();
	while (sim_resident() >= sim.capacity) {
		if (sim.order == SIM_KERNEL && (!sim.count[SIM_INACTIVE] || sim_inactive_is_low()))
			for (u32 i = 0; i < SIM_BATCH && sim.count[SIM_ACTIVE]; i++) {
				p = sim.tail[SIM_ACTIVE];
				sim_take(p);
				sim.pages[p].flags &= ~SIM_REFERENCED;
				sim_put(p, SIM_INACTIVE);
			}
		p = sim.tail[SIM_INACTIVE];
		if (sim_ask(p) != PAGECACHE_EVICT_KEEP || !sim_keep(p)) {
			sim.all_kept = false;
		} else if (++scanned <= (sim.all_kept ? SIM_BATCH : 2 * sim.capacity)) {
			sim_take(p);
			sim_put(p, sim.order == SIM_KERNEL ? SIM_ACTIVE : SIM_INACTIVE);
			continue;
		} else {
			/* Next time a batch tells so, instead of two rounds of the memory. */
			sim.all_kept = true;
			sim.totals.keep_ignored++;
		}
		sim_remove(p, true);
	}
}

#endif /* SIMULATE_CACHE_H */
