/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * observer_record.bpf.h - what a recording of a load keeps, beside the observer's counters.
 *
 * Events are added up by cell of a file, interval of time and reader, so that a recording costs one
 * more map lookup for each event, and no event is sent to user space by itself.  User space removes
 * the intervals that are over.  Programs that do not record are loaded without all of this.
 */
#ifndef OBSERVER_RECORD_BPF_H
#define OBSERVER_RECORD_BPF_H

#ifndef PAGECACHE_BCC
/*
 * Allocated as a whole, some 16 MiB: elements that are allocated as they come are 4 to begin with,
 * and no more can be had while interrupts are off, as they are where pages are added
 * (kernel/bpf/memalloc.c): the first events of a load were lost.
 */
OBSERVER_MAP(BPF_MAP_TYPE_HASH, recorded, 1 << 16, 0, struct pagecache_recorded_key,
	     struct pagecache_recorded_value);

/* What is recorded for a page of a file now, NULL if nothing is or there is no room. */
static __always_inline struct pagecache_recorded_value *recorded_at(u32 slot, u64 index, u32 tgid)
{
	struct pagecache_recorded_key key = {};
	struct pagecache_recorded_value *value;
	struct pagecache_observer_state *all;

	if (!observer_record_tick_ns)
		return NULL;
	key.slot = slot;
	key.cell = index >> (observer_record_cell_shift & 63);
	key.tick = (bpf_ktime_get_ns() - observer_record_start_ns) / observer_record_tick_ns;
	key.tgid = tgid;
	value = MAP_LOOKUP(recorded, &key);
	if (value)
		return value;
	MAKE_ELEMENT(recorded, &key);
	value = MAP_LOOKUP(recorded, &key);
	if (!value) {
		all = observer();
		if (all)
			__sync_fetch_and_add(&all->lost_records, 1);
	}
	return value;
}

static __always_inline void record(struct pagecache_recorded_value *value, u64 counter, u64 n)
{
	if (value && n && counter < PAGECACHE_RECORDED_NR)
		__sync_fetch_and_add(&value->counters[counter], n);
}
#else
static __always_inline struct pagecache_recorded_value *recorded_at(u32 slot, u64 index, u32 tgid)
{
	return NULL;
}

static __always_inline void record(struct pagecache_recorded_value *value, u64 counter, u64 n)
{
}
#endif

#define RECORD_CELLS 32 /* of one event; what is beyond counts for the last of them */

/* How many of the pages [index, index + nr) lie in the cell of the first. */
static __always_inline u64 pages_in_cell(u64 index, u64 nr, u32 turn)
{
	u64 cell = 1ULL << (observer_record_cell_shift & 63);
	u64 room = cell - (index & (cell - 1));

	return turn == RECORD_CELLS - 1 || nr < room ? nr : room;
}

#ifdef PAGECACHE_BCC
#define RECORD_STEPS static __always_inline int
#else
#define RECORD_STEPS __noinline int /* a global function: the verifier goes through it once */
#endif

RECORD_STEPS record_by_cell(u32 slot, u64 index, u64 nr, u64 counter)
{
	for (u32 turn = 0; turn < RECORD_CELLS && nr; turn++) {
		u64 pages = pages_in_cell(index, nr, turn);

		record(recorded_at(slot, index, 0), counter, pages << (observer_page_shift & 31));
		index += pages;
		nr -= pages;
	}
	return 0;
}

/* Pages that came or went: a folio may be larger than a cell. */
static __always_inline void record_pages(u32 slot, u64 index, u64 nr, u32 counter)
{
	if (observer_record_tick_ns)
		record_by_cell(slot, index, nr, counter);
}

/*
 * An access to the pages [from, to), spread evenly over their cells: the sums are exact.  late: its
 * reader has waited for what was prefetched.
 */
static __always_inline void record_access(u32 slot, u64 from, u64 to, u32 tgid,
					  const struct found *found, bool late)
{
	u32 shift = observer_page_shift & 31;
	u64 hit, ours, ahead, miss, nr = to - from;

	if (!observer_record_tick_ns || from >= to)
		return;
	hit = found->hit - found->ours;
	ours = found->ours;
	ahead = found->ahead;
	miss = found->miss;
	for (u32 turn = 0; turn < RECORD_CELLS && nr; turn++) {
		u64 pages = pages_in_cell(from, nr, turn);
		struct pagecache_recorded_value *value = recorded_at(slot, from, tgid);
		u64 part_hit = hit * pages / nr, part_ours = ours * pages / nr;
		u64 part_ahead = ahead * pages / nr, part_miss = miss * pages / nr;

		record(value, PAGECACHE_RECORDED_hit_bytes, part_hit << shift);
		if (late)
			record(value, PAGECACHE_RECORDED_late_bytes, part_ours << shift);
		else
			record(value, PAGECACHE_RECORDED_useful_bytes, part_ours << shift);
		record(value, PAGECACHE_RECORDED_ahead_bytes, part_ahead << shift);
		record(value, PAGECACHE_RECORDED_miss_bytes, part_miss << shift);
		hit -= part_hit;
		ours -= part_ours;
		ahead -= part_ahead;
		miss -= part_miss;
		from += pages;
		nr -= pages;
	}
}

#endif /* OBSERVER_RECORD_BPF_H */
