/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * simulate_replay.h - the second half of simulate_cache.h: pages enter the cache, accesses of a
 * trace are replayed, and the interface to pagecache_bpf/simulate/simulator.py.
 */
#ifndef SIMULATE_REPLAY_H
#define SIMULATE_REPLAY_H

#include "simulate_cache.h"

/* --- entering the cache --- */

static inline void sim_read(u32 file, u64 index, bool used)
{
	u32 p = sim.files[file].first + index, list = SIM_INACTIVE;
	struct sim_page *page = &sim.pages[p];
	u64 bytes = 1ULL << sim.shift;

	if (page->list)
		return;
	sim_make_room();
	/* A page that would not have been evicted from lists a little longer is active. */
	if (sim.order == SIM_KERNEL && page->gone_at &&
	    sim.age - page->gone_at <= sim.count[SIM_ACTIVE])
		list = SIM_ACTIVE;
	page->file = file;
	page->cgroup_id = sim.cgroup_id;
	page->flags = used ? SIM_REFERENCED : SIM_UNUSED;
	if (list == SIM_ACTIVE)
		page->flags |= SIM_WORKINGSET;
	sim_put(p, list);
	sim.totals.read += bytes;
	sim_note(p, used ? SIM_NOTE_READ : SIM_NOTE_PREFETCHED, bytes);
	if (page->seen)
		sim.totals.reread += bytes;
	page->seen = 1;
	if (sim_resident() << sim.shift > sim.totals.peak)
		sim.totals.peak = sim_resident() << sim.shift;
	sim_told(true, p);
}

static inline void sim_run_prefetches(void)
{
	for (u32 i = 0; i < sim.nr_prefetches; i++) {
		struct sim_wish wish = sim.prefetches[i];

		for (u64 k = 0; k < wish.nr; k++) {
			sim_read(wish.file, wish.start + k, false);
			if (wish.step && k % wish.step == 0)
				sim.pages[sim.files[wish.file].first + wish.start + k].flags |=
					SIM_MARK;
		}
	}
	sim.nr_prefetches = 0;
}

static inline void sim_ask_readahead(u32 file, u64 index, u64 nr, u32 kind)
{
	struct pagecache_answer answer = {
		.mark = PAGECACHE_NO_MARK,
		.node = PAGECACHE_NODE_ANY,
		.order = PAGECACHE_ORDER_AUTO,
	};
	struct sim_file *f = &sim.files[file];
	struct pagecache_ctx ctx;
	s32 verdict;

	if (!f->governed || !sim.ops->readahead)
		return;
	ctx = sim_ctx(file, index, nr, kind);
	verdict = sim.ops->readahead(&ctx, &answer);
	if (verdict == PAGECACHE_OVERRIDE && answer.start < f->pages) {
		for (u64 k = 0; k < answer.nr && answer.start + k < f->pages; k++)
			sim_read(file, answer.start + k, false);
		if (answer.mark < f->pages)
			sim.pages[f->first + answer.mark].flags |= SIM_MARK;
	} else if (verdict != PAGECACHE_OVERRIDE && verdict != PAGECACHE_DEFAULT) {
		sim.totals.invalid++;
	}
	sim_run_prefetches();
}

static inline void sim_touch(u32 file, u64 index, u64 left, u64 bytes)
{
	u32 p = sim.files[file].first + index;
	struct sim_page *page = &sim.pages[p];

	sim.totals.wanted += bytes;
	if (!page->list) {
		sim.totals.missed += bytes;
		sim_ask_readahead(file, index, left, PAGECACHE_KIND_MISS);
		if (!page->list)
			sim_read(file, index, true);
		page->flags = (page->flags & ~SIM_UNUSED) | SIM_REFERENCED;
		sim_note(p, SIM_NOTE_MISS, bytes);
		return;
	}
	sim_note(p, page->flags & SIM_UNUSED ? SIM_NOTE_USEFUL : SIM_NOTE_HIT, bytes);
	*(page->flags & SIM_UNUSED ? &sim.totals.ahead : &sim.totals.hit) += bytes;
	page->flags &= ~SIM_UNUSED;
	if (sim.order == SIM_LRU) {
		sim_take(p);
		sim_put(p, SIM_INACTIVE);
	} else if (page->list == SIM_INACTIVE && page->flags & SIM_REFERENCED) {
		/* mm/swap.c:folio_mark_accessed() */
		sim_take(p);
		sim_put(p, SIM_ACTIVE);
		page->flags &= ~SIM_REFERENCED;
		sim.age++;
	} else {
		page->flags |= SIM_REFERENCED;
	}
	if (page->flags & SIM_MARK) {
		page->flags &= ~SIM_MARK;
		sim_ask_readahead(file, index, left, PAGECACHE_KIND_MARKER);
	}
}

static inline void sim_access(const struct sim_event *event)
{
	struct sim_file *f = &sim.files[event->file];
	u64 size = 1ULL << sim.shift, end = event->offset + event->length;
	u64 first = event->offset >> sim.shift, last;
	struct pagecache_ctx ctx;

	sim.now_ns = event->time_ns;
	sim.tgid = event->tgid;
	sim.cgroup_id = event->cgroup_id;
	if (end > f->bytes)
		end = f->bytes;
	if (event->offset >= end)
		return;
	last = (end - 1) >> sim.shift;
	f->quiet = first == f->next ? f->quiet + last + 1 - first : ~0ULL;
	f->next = last + 1;
	if (f->governed && sim.ops->access && f->quiet >= sim.ops->access_step_bytes >> sim.shift) {
		f->quiet = 0;
		ctx = sim_ctx(event->file, first, last + 1 - first, event->kind);
		sim.ops->access(&ctx);
		sim_run_prefetches();
	}
	for (u64 index = first; index <= last; index++) {
		u64 from = index << sim.shift, to = from + size;

		from = from > event->offset ? from : event->offset;
		to = to < end ? to : end;
		sim_touch(event->file, index, last + 1 - index, to - from);
	}
	sim_run_drops();
}

/* --- what pagecache_bpf/simulate/simulator.py calls --- */

void sim_policy(bool on);

/* Sizes and models of the files; 0: done, -12: no memory, else what the policy's init returned. */
s64 sim_start(u64 memory, u32 shift, u32 order, bool on, u32 nr_files, const u64 *bytes,
	      const u32 *models, const u8 *governed)
{
	struct pagecache_ctx ctx = {
		.node = -1,
		.page_shift = shift,
		.keep_max_pages = memory >> shift,
	};

	sim.files = calloc(nr_files + 1, sizeof(*sim.files));
	sim.capacity = memory >> shift;
	sim.keep_max = sim.capacity;
	sim.shift = shift;
	sim.order = order;
	sim.nr_files = nr_files;
	sim.lent = false;
	sim.random = 88172645463325252ULL;
	for (u32 list = 0; list < SIM_LISTS; list++)
		sim.head[list] = sim.tail[list] = SIM_NONE;
	for (u32 i = 0; sim.files && i < nr_files; i++) {
		sim.files[i].bytes = bytes[i];
		sim.files[i].pages = (bytes[i] + (1ULL << shift) - 1) >> shift;
		sim.files[i].first = sim.nr_pages;
		sim.files[i].model = models[i];
		sim.files[i].governed = governed[i];
		sim.nr_pages += sim.files[i].pages;
	}
	sim.pages = calloc(sim.nr_pages + 1, sizeof(*sim.pages));
	if (!sim.files || !sim.pages)
		return -12;
	sim_policy(on);
	return sim.ops->init ? sim.ops->init(&ctx) : 0;
}

/* From now on the files are lent, in their order. */
void sim_lend(void)
{
	sim.lent = true;
}

/* The parent of each control group, by id less 1; 0: it lies right below the root. */
long sim_cgroups(u64 nr, const u64 *parents)
{
	sim.parents = calloc(nr + 1, sizeof(*parents));
	if (!sim.parents)
		return -12;
	memcpy(sim.parents, parents, nr * sizeof(*parents));
	return 0;
}

/* Note from now on what parts of that many pages go through; where that is added up. */
u64 *sim_record(u64 cell_pages, u64 *nr_cells)
{
	*nr_cells = 0;
	sim.cell_pages = cell_pages;
	for (u32 i = 0; i < sim.nr_files; i++) {
		sim.files[i].first_cell = *nr_cells;
		*nr_cells += (sim.files[i].pages + cell_pages - 1) / cell_pages;
	}
	sim.notes = calloc(*nr_cells * SIM_NOTES + 1, sizeof(*sim.notes));
	return sim.notes;
}

const struct sim_totals *sim_replay(const struct sim_event *events, u64 nr)
{
	for (u64 i = 0; i < nr; i++)
		sim_access(&events[i]);
	return &sim.totals;
}

u64 sim_resident_pages(u32 file)
{
	return sim.files[file].resident;
}

const char *sim_exit(s64 *code)
{
	*code = sim.exit_code;
	return sim.exit_message;
}

long sim_hint(const void *map, const u32 *shape, const void *key, const void *value)
{
	return sim_map_update(map, *(const struct sim_shape *)shape, key, value, BPF_ANY);
}

long sim_report(const void *map, const u32 *shape, const void *key, void *next, void *value)
{
	struct sim_shape wanted = *(const struct sim_shape *)shape;
	long error = sim_next_key(map, wanted, key, next);
	void *found = error ? NULL : sim_map_lookup(map, wanted, next);

	if (found)
		memcpy(value, found, wanted.value_size);
	return error;
}

void sim_end(void)
{
	free(sim.parents);
	free(sim.notes);
	free(sim.pages);
	free(sim.files);
	sim_free_maps();
}

#endif /* SIMULATE_REPLAY_H */
