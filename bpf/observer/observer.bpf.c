// SPDX-License-Identifier: GPL-2.0-only
/*
 * observer.bpf.c - what readers of tagged files find in the page cache, counted by model and
 * by process.
 *
 * The tracepoint of reads fires when the pages are there, too late to tell a hit from a miss.  So
 * the programs keep bits for each page of a tagged file, from what enters and leaves the cache:
 * resident, used since it came, prefetched by us.  What a read() finds was hit or brought ahead,
 * unless the same call has added it: that is a miss.  Faults are told of before anything is read.
 */
#include "observer_steps.bpf.h"
#include "observer_causes.bpf.h"
#include "observer_record.bpf.h"

#ifndef PAGECACHE_BCC
#include "access_events.bpf.h"
#include "observer_areas.bpf.h"

char LICENSE[] SEC("license") = "GPL";
#endif

/* Tell user space that a cursor has moved. */
static __always_inline void moved(struct pagecache_observed_file *file,
				  const struct pagecache_file_key *key, u64 index, u64 nr, u32 kind)
{
	struct pagecache_observer_state *all = observer();
	u64 now = bpf_ktime_get_ns(), ids = bpf_get_current_pid_tgid();
	struct pagecache_observed_move move = {};

	file->readers = 1;
	if (!all || !observer_moves ||
	    (observer_moves == 1 && now - file->moved_ns < observer_silent_ns))
		return;
	file->moved_ns = now;
	move.file = *key;
	move.index = index;
	move.nr = nr;
	move.time_ns = now;
	move.tgid = ids >> 32;
	move.tid = (u32)ids;
	move.model = file->model;
	move.kind = kind;
	if (RING_OUTPUT(moves, &move, sizeof(move)))
		__sync_fetch_and_add(&all->lost_moves, 1);
	else
		__sync_fetch_and_add(&all->moves, 1);
}

/* A read() that wants [index, end) has got some pages. */
static __always_inline int count_got(struct address_space *mapping, u64 index, u64 end)
{
	u64 to, call, pages, behind, ino;
	struct inode *inode = host_of(mapping, &ino);
	struct pagecache_observed_value *value;
	struct pagecache_observed_file *file;
	struct pagecache_file_key key;
	struct task_struct *task;
	struct task_state *state;
	struct walk *w;
	u64 waited = 0, from;
	u32 tid;

	if (!may_be_tagged(ino))
		return 0;
	file = tag_of(inode, &key);
	if (!file)
		return 0;
	tid = (u32)bpf_get_current_pid_tgid();
	task = current_task();
	pages = file_pages_of(inode);
	if (end > pages)
		end = pages;
	state = state_of(tid);
	if (index >= end || !state || state_by_us(state, task))
		return 0;
	value = value_of(file->model, bpf_get_current_pid_tgid() >> 32);
	if (!value)
		return 0;

	/* The same call goes on when no other was finished, it wants as much and is further. */
	call = read_calls(task);
	if (state->slot != file->slot || state->call != call || state->end != end ||
	    index <= state->index) {
		state->slot = file->slot;
		state->call = call;
		state->end = end;
		/* Of a batch whose last folio is locked the others are handed out untold. */
		state->counted = first_page_of_call(task, inode, index);
		moved(file, &key, state->counted, end - state->counted, PAGECACHE_KIND_READ);
	}
	state->index = index;
	if (state->waited_ns) {
		if (state->wait_call == call && state->wait_where == whereabouts())
			waited = state->waited_ns;
		state->waited_ns = 0;
		count(value, PAGECACHE_OBSERVED_read_stall_ns, waited);
	}

	to = index + BATCH_FOLIOS * (u64)file->folio_pages;
	if (to > end)
		to = end;
	w = start_walk(state, file->slot, tid);
	w->index = index;
	from = state->counted;
	if (state->counted < to)
		count_read(state, call, to);
	COUNT_PAGES(value, read_bytes, w->found.hit + w->found.ahead + w->found.miss);
	COUNT_PAGES(value, read_hit_bytes, w->found.hit);
	COUNT_PAGES(value, read_ahead_bytes, w->found.ahead);
	COUNT_PAGES(value, read_miss_bytes, w->found.miss);
	COUNT_PAGES(value, demand_bytes, w->found.demand);
	if (waited)
		COUNT_PAGES(value, prefetch_late_bytes, w->found.ours);
	else
		COUNT_PAGES(value, prefetch_useful_bytes, w->found.ours);
	if (state->add_slot == file->slot && state->add_call == call && state->add_to > end) {
		behind = count_behind(state, end);
		COUNT_PAGES(value, readahead_bytes, behind);
	}
	value->last_ns = bpf_ktime_get_ns();
	record_access(file->slot, from, to, bpf_get_current_pid_tgid() >> 32, &w->found, waited);
	if (waited)
		record(recorded_at(file->slot, from, bpf_get_current_pid_tgid() >> 32),
		       PAGECACHE_RECORDED_stall_ns, waited);
	return 0;
}

/* A process has got these pages into its page table: a window around a fault, or a huge page. */
static __always_inline void count_mapped(struct address_space *mapping, struct inode *inode,
					 u64 from, u64 to, bool whole)
{
	u64 ids = bpf_get_current_pid_tgid(), pages = file_pages_of(inode);
	struct pagecache_observed_value *value;
	struct pagecache_observed_file *file;
	struct pagecache_file_key key;
	struct working working;
	struct around *a;

	file = tag_of(inode, &key);
	if (!file)
		return;
	working.state = state_of((u32)ids);
	if (observer_whole_folios && !whole) {
		from = folio_edge(mapping, from, false);
		to = folio_edge(mapping, to - 1, true);
	}
	if (to > pages)
		to = pages;
	if (from >= to || !working.state || state_by_us(working.state, current_task()))
		return;
	value = value_of(file->model, ids >> 32);
	if (!value)
		return;
	note_mapper(ids >> 32);
	a = &working.state->around;
	__builtin_memset(a, 0, sizeof(*a));
	a->mapping = mapping;
	a->word = from / 64;
	a->from = from;
	a->to = to;
	a->slot = file->slot;
	a->tgid = ids >> 32;
	a->whole = whole;
	/*
	 * If nothing is new in the whole window the file has been mapped once more; unless this
	 * is the end of a fault, whose page has been counted.
	 */
	a->again = !(working.state->fault_pending && working.state->fault_slot == file->slot &&
		     working.state->fault_index >= from && working.state->fault_index < to);
	working.state->fault_pending = 0;
	LOOP(step_mapped, &working);
	if (a->failed)
		return;
	LOOP(step_first, &working);
	moved(file, &key, from, to - from, PAGECACHE_KIND_MAP);
	COUNT_PAGES(value, mmap_bytes, a->found.hit + a->found.ahead + a->found.miss);
	COUNT_PAGES(value, mmap_hit_bytes, a->found.hit);
	COUNT_PAGES(value, mmap_ahead_bytes, a->found.ahead);
	COUNT_PAGES(value, mmap_miss_bytes, a->found.miss);
	COUNT_PAGES(value, prefetch_useful_bytes, a->found.ours);
	value->last_ns = bpf_ktime_get_ns();
	record_access(file->slot, from, to, ids >> 32, &a->found, false);
}

/* A page is faulted. */
static __always_inline int count_faulted(struct address_space *mapping, u64 index)
{
	struct inode *inode = READ(mapping, host);
	u64 ids = bpf_get_current_pid_tgid(), bit = 1ULL << (index & 63);
	u64 resident;
	u32 at = index / 64 % BITS_WORDS;
	struct pagecache_observed_value *value;
	struct pagecache_observed_file *file;
	struct pagecache_file_key key;
	struct task_state *state;
	struct found found = {};
	struct page_bits *bits;
	struct seen_bits *seen;

	file = tag_of(inode, &key);
	if (!file)
		return 0;
	state = state_of((u32)ids);
	if (!state || state_by_us(state, current_task()))
		return 0;
	bits = bits_of(file->slot, index / BITS_PAGES, true);
	seen = seen_of(file->slot, ids >> 32, index / BITS_PAGES);
	value = value_of(file->model, ids >> 32);
	if (!bits || !seen || !value)
		return 0;
	state->fault_where = whereabouts();
	state->fault_model = file->model;
	/* The kernel tries again after it has let go of its locks to wait. */
	if (state->fault_pending && state->fault_slot == file->slot && state->fault_index == index)
		return 0;
	state->fault_slot = file->slot;
	state->fault_index = index;
	state->fault_pending = FAULT_TOLD;
	/* Mapping around a fault has passed over it, so it is counted already. */
	if (__sync_fetch_and_or(&seen->seen[at], bit) & bit)
		return 0;
	resident = bits->resident[at] & bit;
	moved(file, &key, index, 1, PAGECACHE_KIND_TOUCH);
	classify(bits, at, bit, 0, false, &found);
	COUNT_PAGES(value, mmap_bytes, 1);
	COUNT_PAGES(value, mmap_hit_bytes, found.hit);
	COUNT_PAGES(value, mmap_ahead_bytes, found.ahead);
	COUNT_PAGES(value, mmap_miss_bytes, found.miss);
	/* One that had arrived would have been mapped by map_pages. */
	COUNT_PAGES(value, prefetch_late_bytes, found.ours);
	value->last_ns = bpf_ktime_get_ns();
	record_access(file->slot, index, index + 1, ids >> 32, &found, true);
	if (observer_whole_folios && resident) {
		u64 from = folio_edge(mapping, index, false);
		u64 to = folio_edge(mapping, index, true);

		if (to - from > 1)
			count_mapped(mapping, inode, from, to, true);
		state->fault_pending = FAULT_TOLD;
	}
	return 0;
}

/* Pages around a fault are mapped. */
static __always_inline int count_around(struct address_space *mapping, u64 from, u64 to)
{
	struct inode *inode;
	u64 ino;

	inode = host_of(mapping, &ino);
	if (may_be_tagged(ino))
		count_mapped(mapping, inode, from, to, false);
	return 0;
}

#ifdef PAGECACHE_BCC
OBSERVE(mm_filemap_get_pages, observe_get_pages)
{
	return count_got((void *)args[0], args[1], args[2] + 1);
}

OBSERVE(mm_filemap_map_pages, observe_map_pages)
{
	return count_around((void *)args[0], args[1], args[2] + 1);
}

OBSERVE(mm_filemap_fault, observe_fault)
{
	return count_faulted((void *)args[0], args[1]);
}
#else
static __always_inline int count_fault(struct address_space *mapping, u64 from, u64 to)
{
	return count_faulted(mapping, from);
}

ACCESS_PROGRAMS(observe, observer_page_shift, count_got, count_around, count_fault)

/*
 * Huge pages are mapped whole, and no tracepoint of the page cache tells.  So the faults of
 * processes that map tagged files are looked at when they begin.
 */
static __always_inline int observe_user_fault(u64 address)
{
	struct fault f = { .address = address };
	u32 tgid;

	if (!huge_mappings_possible() || in_last_memory(address))
		return 0;
	tgid = bpf_get_current_pid_tgid() >> 32;
	if (!MAP_LOOKUP(mappers, &tgid))
		return 0;
	huge_page_at(&f);
	if (f.mapping)
		count_mapped(f.mapping, f.inode, f.from, f.from + MAX_FOLIO_PAGES, true);
	return 0;
}

OBSERVE(page_fault_user, observe_page_fault)
{
	return observe_user_fault(args[0]);
}

/* The kernel's own accesses for a system call: write() from a mapping. */
OBSERVE(page_fault_kernel, observe_page_fault_kernel)
{
	return observe_user_fault(args[0]);
}

/* A place for a mapping is looked for: of a tagged file? */
OBSERVE(vm_unmapped_area, observe_mmap)
{
	struct pagecache_file_key key;
	struct file *file;

	if (syscall_number() != observer_sys_mmap || (s32)syscall_argument(5) < 0)
		return 0;
	file = file_of(current_task(), syscall_argument(5));
	if (file && tag_of(READ(file, f_inode), &key) && !by_us(current_task()))
		note_mapper(bpf_get_current_pid_tgid() >> 32);
	return 0;
}
#endif

OBSERVE(mm_filemap_add_to_page_cache, observe_added)
{
	struct folio *folio = (void *)args[0];
	struct inode *inode = READ(mapping_of(folio), host);
	struct pagecache_observed_value *value;
	struct pagecache_observed_file *file;
	struct pagecache_file_key key;
	struct task_state *state;
	enum added_by by;
	u64 index, nr, used;

	file = inode ? tag_of(inode, &key) : NULL;
	if (!file)
		return 0;
	index = index_of(folio);
	nr = folio_pages(folio);
	__sync_fetch_and_add(&file->resident_pages, nr);
	__sync_fetch_and_add(&file->added_pages, nr);
	if (nr > file->folio_pages)
		file->folio_pages = nr < MAX_FOLIO_PAGES ? nr : MAX_FOLIO_PAGES;
	if (nr >= MAX_FOLIO_PAGES)
		note_huge(HUGE_FOLIO);
	state = state_of((u32)bpf_get_current_pid_tgid());
	if (!state)
		return 0;
	by = added_by(file, state, index, nr);
	value = value_of(file->model, by == BY_US ? 0 : bpf_get_current_pid_tgid() >> 32);
	if (!value)
		return 0;
	COUNT_PAGES(value, added_bytes, nr);
	record_pages(file->slot, index, nr,
		     by == BY_US ? PAGECACHE_RECORDED_prefetched_bytes
				 : PAGECACHE_RECORDED_read_bytes);
	used = index + nr; /* the page that is used already: none */
	if (by == BY_US) {
		COUNT_PAGES(value, prefetched_bytes, nr);
	} else if (by == BY_FAULT) {
		COUNT_PAGES(value, demand_bytes, 1);
		COUNT_PAGES(value, readahead_bytes, nr - 1);
		state->fault_pending = FAULT_READ;
		used = state->fault_index;
	} else if (by == BY_REQUEST) {
		COUNT_PAGES(value, requested_bytes, nr);
	} else if (by == BY_OTHERS) {
		COUNT_PAGES(value, readahead_bytes, nr);
	} else {
		extend_added(state, file->slot, index, nr);
	}
	add_folio(state, file->slot, index, nr, used, by);
	return 0;
}

OBSERVE(mm_filemap_delete_from_page_cache, observe_removed)
{
	struct folio *folio = (void *)args[0];
	struct inode *inode = READ(mapping_of(folio), host);
	struct pagecache_observed_value *value;
	struct pagecache_observed_file *file;
	struct pagecache_file_key key;
	struct task_state *state;
	struct found found = {};
	u64 index, nr;
	u32 cause;

	file = inode ? tag_of(inode, &key) : NULL;
	if (!file)
		return 0;
	index = index_of(folio);
	nr = folio_pages(folio);
	__sync_fetch_and_add(&file->resident_pages, -nr);
	__sync_fetch_and_add(&file->removed_pages, nr);
	state = state_of((u32)bpf_get_current_pid_tgid());
	value = value_of(file->model, 0);
	if (!value || !state)
		return 0;
	remove_folio(state, file->slot, index, nr, &found);
	COUNT_PAGES(value, removed_bytes, nr);
	COUNT_PAGES(value, prefetch_wasted_bytes, found.ours);
	COUNT_PAGES(value, readahead_wasted_bytes, found.ahead);
	cause = eviction_cause(state, inode, index);
	count(value, cause, nr << (observer_page_shift & 31));
	record_pages(file->slot, index, nr,
		     cause == PAGECACHE_OBSERVED_evicted_reclaim_bytes
			     ? PAGECACHE_RECORDED_reclaimed_bytes
		     : cause == PAGECACHE_OBSERVED_evicted_drop_bytes
			     ? PAGECACHE_RECORDED_dropped_bytes
			     : PAGECACHE_RECORDED_discarded_bytes);
	record_pages(file->slot, index, found.ours, PAGECACHE_RECORDED_wasted_bytes);
	return 0;
}

/* Only tasks that sleep for I/O are looked at: the rest of the system pays for two bits. */
OBSERVE(sched_switch, observe_switch)
{
	struct task_struct *out = (void *)args[1], *in = (void *)args[2];
	struct pagecache_observed_value *value;
	struct task_state *state;
	u64 call, where;
	u32 tid;

	if (in_iowait(out) && !(READ(out, flags) & PF_KTHREAD)) {
		state = state_of(READ(out, pid));
		if (state) {
			call = read_calls(out);
			where = whereabouts();
			if (state->wait_call != call || state->wait_where != where)
				state->waited_ns = 0;
			state->wait_call = call;
			state->wait_where = where;
			state->wait_since = bpf_ktime_get_ns();
		}
	}
	if (in_iowait(in)) {
		tid = READ(in, pid);
		state = MAP_LOOKUP(task_states, &tid);
		if (!state || !state->wait_since)
			return 0;
		call = bpf_ktime_get_ns() - state->wait_since;
		state->wait_since = 0;
		if (!state->fault_where || state->fault_where != state->wait_where) {
			state->waited_ns += call; /* a read() will claim it, or nobody */
			return 0;
		}
		value = value_of(state->fault_model, READ(in, tgid));
		if (value)
			count(value, PAGECACHE_OBSERVED_mmap_stall_ns, call);
		record(recorded_at(state->fault_slot, state->fault_index, READ(in, tgid)),
		       PAGECACHE_RECORDED_stall_ns, call);
	}
	return 0;
}
