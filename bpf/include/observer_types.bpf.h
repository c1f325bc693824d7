/* SPDX-License-Identifier: GPL-2.0-only */
/* observer_types.bpf.h - what the maps of observer.bpf.h hold, which includes it. */
#ifndef OBSERVER_TYPES_BPF_H
#define OBSERVER_TYPES_BPF_H

/* Which pages of a file ... */
struct bits_key {
	u32 slot;
	u32 block;
};

struct page_bits {
	u64 resident[BITS_WORDS]; /* are in the cache */
	u64 touched[BITS_WORDS]; /* have been used since they came, or came before the tag */
	u64 ours[BITS_WORDS]; /* came by a policy's prefetch and are not used yet */
	u64 fresh[BITS_WORDS]; /* came in a read() that has not told yet what it wanted */
	u32 adder; /* the task that made the last one fresh */
	u32 unused;
};

/* Which pages of a file a process has been seen to map. */
struct seen_key {
	u32 slot;
	u32 tgid;
	u32 block;
};

struct seen_bits {
	u64 seen[BITS_WORDS];
};

/* What wanted pages were. */
struct found {
	u32 hit;
	u32 ahead;
	u32 miss;
	u32 demand; /* of miss: added by this very call */
	u32 ours; /* of hit: prefetched, first use */
};

/* Who brought pages into the cache. */
enum added_by {
	BY_FAULT, /* one of them is wanted */
	BY_READ, /* how many are wanted is told at its end */
	BY_REQUEST,
	BY_OTHERS, /* readahead of another fault, a write */
	BY_US,
};

/* A walk over the pages [from, to) of a file, a word of page bits a step. */
struct walk {
	struct found found;
	u64 word; /* the next */
	u64 from;
	u64 to;
	u64 index;
	u64 add_from;
	u64 add_to;
	u64 stopped; /* where, if short of `to` */
	u32 slot;
	u32 tid;
	u32 pages;
	u32 by; /* enum added_by */
};

/* Which pages of a word are in the cache, but cannot be mapped yet. */
struct transit {
	struct xa_node *leaf; /* the node of the index that has a slot for each */
	u64 pages; /* those that are not looked at yet */
	u64 waiting;
};

/* One fault-around. */
struct around {
	struct found found;
	struct address_space *mapping;
	u64 word;
	u64 from;
	u64 to;
	u64 mapped[MAP_WORDS];
	u32 slot;
	u32 tgid;
	u32 whole; /* a huge page: nothing of it can be on its way */
	u32 unused;
	u32 again; /* nothing is new: the file has been mapped once more */
	u32 failed;
};

/* A fault of a process that maps tagged files. */
struct fault {
	u64 address;
	struct address_space *mapping;
	struct inode *inode;
	u64 from; /* first page of the huge page */
};

/* What a task is doing in tagged files. */
struct task_state {
	/* read(): the call, what it wants, how much of that is counted */
	u64 call; /* number of read calls that the task had finished when this one began */
	u64 index;
	u64 end;
	u64 counted;
	/* pages that the task has added in a call */
	u64 add_call;
	u64 add_from;
	u64 add_to;
	/* sleeping for I/O: since when, in which call or fault, how long so far */
	u64 wait_since;
	u64 wait_where;
	u64 wait_call;
	u64 waited_ns;
	/* the last fault, until it is known what became of it */
	u64 fault_where;
	u64 fault_index;
	u32 slot; /* of the read; 0: none */
	u32 add_slot;
	u32 fault_slot;
	u32 fault_model;
	u32 fault_pending; /* FAULT_* */
	u32 ours; /* what by_us() said of the task that began then, */
	u64 started;
	u64 own_changes; /* when the processes that are ours had changed so often */
	union {
		struct walk walk;
		struct around around;
	};
	struct transit transit;
};

struct zeroes {
	u8 bytes[1024];
};

#endif
