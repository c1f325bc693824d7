/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * pagecache_observer.h - the part of the ABI that the observer's programs and user space share:
 * what they count, and what a recording of a load keeps.  Included by pagecache_abi.h.
 */
#ifndef PAGECACHE_OBSERVER_H
#define PAGECACHE_OBSERVER_H

/*
 * The observer: what a tagged file's readers found in the page cache, counted in the kernel by
 * programs on tracepoints.  X(name, unit, help) in the order of enum pagecache_observed_counter;
 * Python, JSON, metrics and the docs take their names and texts from here.  A page counts as its
 * bytes, however little of it is wanted.  docs/observing.md says what cannot be seen.
 *
 * read_bytes = hit + ahead + miss, and so for mmap; each is counted where it is decided.
 */
#define PAGECACHE_OBSERVED(X)                                                                     \
	X(read_bytes, "bytes", "wanted by read() and its like")                                   \
	X(read_hit_bytes, "bytes", "of these: cached, used before or prefetched for this model")  \
	X(read_ahead_bytes, "bytes", "of these: first use of what readahead had brought")         \
	X(read_miss_bytes, "bytes", "of these: absent, read in by the call that wanted them")     \
	X(mmap_bytes, "bytes", "first touched in a mapping, or mapped along with a touched page") \
	X(mmap_hit_bytes, "bytes", "of these: cached, used before or prefetched for this model")  \
	X(mmap_ahead_bytes, "bytes", "of these: first use of what readahead had brought")         \
	X(mmap_miss_bytes, "bytes", "of these: absent, read in by the fault that wanted them")    \
	X(read_stall_ns, "ns", "time that read() and its like slept for I/O on tagged files")     \
	X(mmap_stall_ns, "ns", "time that faults slept for I/O on tagged files")                  \
	X(added_bytes, "bytes", "entered the page cache, whoever asked")                          \
	X(demand_bytes, "bytes", "of these: brought by the read or fault that wanted them")       \
	X(readahead_bytes, "bytes", "of these: brought by the kernel beyond what was wanted")     \
	X(requested_bytes, "bytes", "of these: asked for by readahead(), fadvise() or madvise()") \
	X(prefetched_bytes, "bytes", "of these: brought by a policy's prefetch")                  \
	X(prefetch_useful_bytes, "bytes", "prefetched, first use: it was there in time")          \
	X(prefetch_late_bytes, "bytes", "prefetched, first use: its reader had to wait for it")   \
	X(prefetch_wasted_bytes, "bytes", "prefetched, and left the cache unused")                \
	X(readahead_wasted_bytes, "bytes", "brought by anyone else, and left the cache unused")   \
	X(removed_bytes, "bytes", "left the page cache, whatever the cause")                      \
	X(evicted_reclaim_bytes, "bytes", "of these: memory was short")                           \
	X(evicted_drop_bytes, "bytes", "of these: dropped by a policy")                           \
	X(evicted_fadvise_bytes, "bytes", "of these: dropped by an application's fadvise()")      \
	X(evicted_truncate_bytes, "bytes", "of these: the file was truncated or deleted")         \
	X(evicted_other_bytes, "bytes", "of these: drop_caches, unmount, direct I/O, unknown")

enum pagecache_observed_counter {
#define PAGECACHE_X(name, unit, help) PAGECACHE_OBSERVED_##name,
	PAGECACHE_OBSERVED(PAGECACHE_X)
#undef PAGECACHE_X
		PAGECACHE_OBSERVED_NR,
};

#define PAGECACHE_COMM_LEN 16

/* A file that is observed: value of the map `observed_files`, by struct pagecache_file_key. */
struct pagecache_observed_file {
	__u32 model; /* small number; user space knows the name */
	__u32 slot; /* small number of the file, part of the keys of its page bits */
	__s64 resident_pages; /* in the cache: found there when tagged, plus added, less removed */
	__u64 added_pages;
	__u64 removed_pages;
	__u32 folio_pages; /* the largest folio seen */
	__u32 readers; /* 1: somebody has read or mapped it */
	__u64 moved_ns; /* when the last cursor move was told */
};

/* Who read: key of the map `observed`.  Consumer 0: what no reader did. */
struct pagecache_observed_key {
	__u32 model;
	__u32 tgid; /* in the initial PID namespace */
};

struct pagecache_observed_value {
	__u64 counters[PAGECACHE_OBSERVED_NR];
	__u64 last_ns; /* CLOCK_MONOTONIC */
	char comm[PAGECACHE_COMM_LEN];
};

/* A cursor has moved: record of the ring buffer `moves`. */
struct pagecache_observed_move {
	struct pagecache_file_key file;
	__u64 index; /* first page that is wanted */
	__u64 nr; /* pages */
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u32 tgid;
	__u32 tid;
	__u32 model;
	__u32 kind; /* enum pagecache_kind: READ, MAP or TOUCH */
};

/*
 * A recording of a load: what happened in one cell of a file during one interval of time.  Cells
 * are as large, and intervals as long, as user space says before the programs are loaded, so that
 * the recording of a load of any size is bounded.  Key of the map `recorded`.
 */
struct pagecache_recorded_key {
	__u32 slot; /* of the file */
	__u32 cell; /* bytes [cell, cell + 1) times the size of a cell */
	__u32 tick; /* number of the interval since the recording began */
	__u32 tgid; /* the reader; 0: what no reader did */
};

#define PAGECACHE_RECORDED(X)                                                                   \
	X(hit_bytes, "bytes", "accessed: cached, used before")                                  \
	X(useful_bytes, "bytes", "accessed: prefetched, first use, there in time")              \
	X(late_bytes, "bytes", "accessed: prefetched, first use, its reader waited for it")     \
	X(ahead_bytes, "bytes", "accessed: first use of what readahead had brought")            \
	X(miss_bytes, "bytes", "accessed: absent, read in by the call or fault that wanted it") \
	X(prefetched_bytes, "bytes", "entered the cache by a policy's prefetch")                \
	X(read_bytes, "bytes", "entered the cache otherwise: demand and readahead")             \
	X(reclaimed_bytes, "bytes", "left the cache: memory was short")                         \
	X(dropped_bytes, "bytes", "left the cache: dropped by a policy")                        \
	X(discarded_bytes, "bytes", "left the cache: fadvise, truncation, drop_caches, other")  \
	X(wasted_bytes, "bytes", "of what left: prefetched, and never used")                    \
	X(stall_ns, "ns", "time that the reader slept for I/O here")

enum pagecache_recorded_counter {
#define PAGECACHE_X(name, unit, help) PAGECACHE_RECORDED_##name,
	PAGECACHE_RECORDED(PAGECACHE_X)
#undef PAGECACHE_X
		PAGECACHE_RECORDED_NR,
};

struct pagecache_recorded_value {
	__u64 counters[PAGECACHE_RECORDED_NR];
};

/* The only element of the map `observer_state`: what was sent to user space, and what got lost. */
struct pagecache_observer_state {
	__u64 moves; /* moves of cursors that were sent */
	__u64 lost_moves; /* found the ring buffer full */
	__u64 lost_pages; /* page bits that no memory was left for: their pages count as missed */
	__u64 lost_consumers; /* accesses counted for consumer 0 since the map was full */
	__u64 lost_records; /* events that are in no recording since its map was full */
};

_Static_assert(sizeof(struct pagecache_observed_file) == 48, "observed file has a hole");
_Static_assert(sizeof(struct pagecache_observed_key) == 8, "observed key has a hole");
_Static_assert(sizeof(struct pagecache_observed_value) == 8 * PAGECACHE_OBSERVED_NR + 24,
	       "observed value has a hole");
_Static_assert(sizeof(struct pagecache_observed_move) == 24 + 40, "move has a hole");
_Static_assert(sizeof(struct pagecache_observer_state) == 40, "observer state has a hole");
_Static_assert(sizeof(struct pagecache_recorded_key) == 16, "recorded key has a hole");
_Static_assert(sizeof(struct pagecache_recorded_value) == 8 * PAGECACHE_RECORDED_NR,
	       "recorded value has a hole");

#endif /* PAGECACHE_OBSERVER_H */
