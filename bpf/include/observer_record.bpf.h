/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * observer_record.bpf.h - what a recording of a load keeps, beside the observer's counters.
 *
 * Events are added up by cell of a file, interval of time and reader, so that a recording costs one
 * more look into a map for each event, and no event is told by itself.  User space takes away the
 * intervals that are over.  Programs that do not record are loaded without all of this.
 */
#ifndef OBSERVER_RECORD_BPF_H
#define OBSERVER_RECORD_BPF_H

#ifndef PAGECACHE_BCC
OBSERVER_MAP(BPF_MAP_TYPE_HASH, recorded, 1 << 16, 1, struct pagecache_recorded_key,
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

static __always_inline void record(struct pagecache_recorded_value *value, u32 counter, u64 n)
{
	if (value && n && counter < PAGECACHE_RECORDED_NR)
		__sync_fetch_and_add(&value->counters[counter], n);
}
#else
static __always_inline struct pagecache_recorded_value *recorded_at(u32 slot, u64 index, u32 tgid)
{
	return NULL;
}

static __always_inline void record(struct pagecache_recorded_value *value, u32 counter, u64 n)
{
}
#endif

#define RECORD_PAGES(value, name, pages) \
	record(value, PAGECACHE_RECORDED_##name, (u64)(pages) << (observer_page_shift & 31))

/* An access; late: its reader has waited for what was prefetched. */
static __always_inline void record_access(struct pagecache_recorded_value *value,
					  const struct found *found, bool late)
{
	if (!value)
		return;
	RECORD_PAGES(value, hit_bytes, found->hit - found->ours);
	if (late)
		RECORD_PAGES(value, late_bytes, found->ours);
	else
		RECORD_PAGES(value, useful_bytes, found->ours);
	RECORD_PAGES(value, ahead_bytes, found->ahead);
	RECORD_PAGES(value, miss_bytes, found->miss);
}

#endif /* OBSERVER_RECORD_BPF_H */
