/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * pagecache_abi.h - the one ABI of pagecache-bpf.
 *
 * Included by the kernel module (kmod/), by every policy (bpf/policies/, through
 * policy.bpf.h) and by user space.  pagecache_bpf/kernel/abi.py is generated from it, and
 * tests compare each size and offset with the BTF of the built module and objects.
 *
 * Rules: fixed-width types only; no implicit padding (every struct is asserted);
 * fields are only ever appended, PAGECACHE_ABI_VERSION grows when they are; page
 * numbers are units of the kernel's PAGE_SIZE, bytes are called bytes.
 */
#ifndef PAGECACHE_ABI_H
#define PAGECACHE_ABI_H

#if !defined(__bpf__) && !defined(PAGECACHE_ENGINE_SIMULATE)
#include <linux/types.h>
#include <linux/ioctl.h>
#endif

#define PAGECACHE_ABI_VERSION 6

#define PAGECACHE_NAME_LEN 32
#define PAGECACHE_MODEL_LEN 64
#define PAGECACHE_PATH_LEN 1024
#define PAGECACHE_REASON_LEN 96
#define PAGECACHE_MESSAGE_LEN 512

#include "pagecache_template.h"

#define PAGECACHE_NODE_ANY (-1) /* no preference: the reader's own node */
#define PAGECACHE_NO_MARK (~0ULL) /* answer without a readahead marker */
#define PAGECACHE_HUGE_BYTES (2 << 20) /* of a huge page of the page cache */
#define PAGECACHE_ORDER_AUTO (~0U) /* folio order left to the engine */

/* Hooks; also the bit numbers of pagecache_info.hooks. */
enum pagecache_hook {
	PAGECACHE_HOOK_INIT = 0,
	PAGECACHE_HOOK_EXIT = 1,
	PAGECACHE_HOOK_READAHEAD = 2,
	PAGECACHE_HOOK_ACCESS = 3,
	PAGECACHE_HOOK_ADDED = 4,
	PAGECACHE_HOOK_REMOVED = 5,
	PAGECACHE_HOOK_EVICT = 6,
	PAGECACHE_HOOK_PRESSURE = 7,
	PAGECACHE_HOOK_NR = 8,
};

/* What a readahead hook returns.  Any other value is an invalid answer. */
enum pagecache_verdict {
	PAGECACHE_DEFAULT = 0, /* the kernel's own readahead */
	PAGECACHE_OVERRIDE = 1, /* read what the answer says; nr == 0: nothing */
};

/* What an evict hook returns.  Any other value is an invalid answer. */
enum pagecache_eviction {
	PAGECACHE_EVICT_DEFAULT = 0, /* as the kernel would */
	PAGECACHE_EVICT_KEEP =
		1, /* not now; within the policy's budget, and while reclaim makes progress */
	PAGECACHE_EVICT_NOW = 2, /* let it go, even if it is in use by a mapping */
};

/* Why a hook runs: pagecache_ctx.kind. */
enum pagecache_kind {
	PAGECACHE_KIND_NONE = 0,
	PAGECACHE_KIND_MISS = 1, /* read(): page absent */
	PAGECACHE_KIND_MARKER = 2, /* read(): reached a readahead marker */
	PAGECACHE_KIND_FAULT = 3, /* mmap: page absent, read-around */
	PAGECACHE_KIND_FAULT_SEQ = 4, /* mmap: page absent, MADV_SEQUENTIAL */
	PAGECACHE_KIND_FAULT_MARKER = 5, /* mmap: reached a readahead marker */
	PAGECACHE_KIND_READ = 6, /* access: read() of a range */
	PAGECACHE_KIND_MAP = 7, /* access: fault-around mapped a range */
	PAGECACHE_KIND_TOUCH = 8, /* access: a fault on one page */
	PAGECACHE_KIND_CGROUP = 9, /* evict, pressure: a memory cgroup is at its limit */
	PAGECACHE_KIND_MACHINE = 10, /* evict, pressure: the whole machine is short of memory */
};

/* pagecache_ctx.flags */
#define PAGECACHE_F_LATE (1U << 0) /* the marked folio is not up to date yet */
#define PAGECACHE_F_LARGE_FOLIOS (1U << 1) /* the file system takes large folios */
#define PAGECACHE_F_WRITABLE (1U << 2) /* the file is open for writing */
/* Of the reader; the access hook and, where it can be known, readahead. */
#define PAGECACHE_F_RANDOM (1U << 9) /* it reads at random: fadvise, madvise */
#define PAGECACHE_F_NOWAIT (1U << 10) /* it must not be kept waiting: IOCB_NOWAIT */
#define PAGECACHE_F_DONTCACHE (1U << 11) /* it wants pages dropped after use: RWF_DONTCACHE */
#define PAGECACHE_F_LENT                                                         \
	(1U << 12) /* a session lends the file: others of its model can be named \
		    */
/* The rest tells an evict hook about the folio. */
#define PAGECACHE_F_REFERENCED \
	(1U << 3) /* used since reclaim saw it last: the kernel may keep it */
#define PAGECACHE_F_MAPPED (1U << 4) /* part of a mapping */
#define PAGECACHE_F_WORKINGSET                                            \
	(1U << 5) /* has been active, or came back soon after an eviction \
		   */
#define PAGECACHE_F_DIRTY (1U << 6)
#define PAGECACHE_F_KEPT (1U << 7) /* kept by this policy before: already part of kept_pages */
#define PAGECACHE_F_BELOW_LOW                                              \
	(1U << 8) /* its cgroup is below memory.low, and is scanned anyway \
		   */

/*
 * What every hook is given.  Read-only for policies.  Fields that a hook cannot
 * know are 0 (node: -1).
 */
struct pagecache_ctx {
	__u64 ino;
	__u64 file_id; /* tells open files of one inode apart; opaque; 0: the hook has no file */
	__u64 index; /* first page wanted, accessed, added, removed or about to be evicted */
	__u64 nr; /* pages wanted, accessed, added, removed or about to be evicted */
	__u64 file_pages; /* size of the file, rounded up */
	__u64 resident_pages; /* pages of this file in the cache now */
	__u64 governed_pages; /* pages of all files of this policy in the cache now */
	__u64 inflight_pages; /* pages this policy has queued for asynchronous prefetch */
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u64 cgroup_id; /* memory cgroup that will be charged; evict: that is charged */
	__u32 dev_major;
	__u32 dev_minor;
	__u32 generation; /* inode generation: inode numbers are reused */
	__u32 model; /* small number of the model the file is tagged with */
	__u32 kind; /* enum pagecache_kind */
	__u32 flags; /* PAGECACHE_F_* */
	__u32 tgid;
	__u32 tid;
	__s32 node; /* NUMA node the reader runs on, -1: unknown; evict: where the folio is */
	__u32 ra_pages; /* readahead window of the open file */
	__u32 io_pages; /* largest request the device takes */
	__u32 page_shift;
	__u64 kept_pages; /* pages in the cache that this policy keeps from being evicted */
	__u64 keep_max_pages; /* bound of kept_pages: pagecache_keep_budget() */
	__u32 priority; /* evict: 12 when reclaim begins, 0 in its last try before an OOM kill */
	__u32 cgroup_pages; /* readahead, access: bound of the reader's cgroup; 0: none, unknown */
	__u64 charged_cgroup_id; /* pressure: memory cgroup that was charged last for this file */
};

/*
 * What a pressure hook is told.  It is asked once for each of the policy's files that have pages
 * in the cache (the ctx is that file's) and answers with pagecache_drop(); then, in round 1, once
 * more for each if that was not enough.
 */
struct pagecache_pressure {
	__u64 pages; /* still wanted: less what went so far */
	__u64 cgroup_id; /* the memory cgroup that is short; 0: the machine is */
	__u32 round; /* 0, then 1 */
	__u32 files; /* files of this policy */
};

/* What the readahead hook fills in.  Preset to "nothing, no marker, any node". */
struct pagecache_answer {
	__u64 start; /* first page */
	__u64 nr; /* pages */
	__u64 mark; /* page that gets the readahead marker, or PAGECACHE_NO_MARK */
	__s32 node; /* NUMA node, or PAGECACHE_NODE_ANY */
	__u32 order; /* wished folio order, or PAGECACHE_ORDER_AUTO */
};

/* How a policy ended: pagecache_exit_record.kind. */
enum pagecache_exit_kind {
	PAGECACHE_EXIT_NONE = 0,
	PAGECACHE_EXIT_DETACHED = 1, /* user space let go of the link */
	PAGECACHE_EXIT_POLICY = 2, /* the policy asked for it */
	PAGECACHE_EXIT_INVALID = 3, /* too many invalid answers */
	PAGECACHE_EXIT_INIT = 4, /* its init failed: never attached */
	PAGECACHE_EXIT_HOOK = 5, /* a hook could not be attached: never attached */
	PAGECACHE_EXIT_SLOW = 6, /* it took too long over its answers */
	PAGECACHE_EXIT_REPLACED = 7, /* other programs answer in its place */
};

struct pagecache_exit_record {
	__u64 seq; /* grows with every record; see PAGECACHE_IOC_EXITS */
	__u64 time_ns; /* CLOCK_REALTIME */
	__s64 code; /* from the policy, or -errno */
	__u32 kind; /* enum pagecache_exit_kind */
	__u32 hook; /* enum pagecache_hook it happened in */
	char policy[PAGECACHE_NAME_LEN];
	char reason[PAGECACHE_REASON_LEN];
	char message[PAGECACHE_MESSAGE_LEN];
};

/*
 * Counters of one policy, in the order of enum pagecache_counter.  X(name, unit, help);
 * Python, JSON and the docs take their names and texts from here.
 */
#define PAGECACHE_COUNTERS(X)                                                                  \
	X(readahead_calls, "calls", "readahead decisions asked of the policy")                 \
	X(readahead_miss, "calls", "of these: read() of an absent page")                       \
	X(readahead_marker, "calls", "of these: a readahead marker was reached")               \
	X(readahead_fault, "calls", "of these: a fault on an absent page of a mapping")        \
	X(readahead_late, "calls", "of these: the marked page was still being read")           \
	X(readahead_default, "calls", "answered: the kernel's own readahead")                  \
	X(readahead_override, "calls", "answered: the policy's window")                        \
	X(readahead_bytes, "bytes", "read in the reader's own context on a policy's answer")   \
	X(access_calls, "calls", "access hook calls")                                          \
	X(added_bytes, "bytes", "pages of governed files that entered the page cache")         \
	X(removed_bytes, "bytes", "pages of governed files that left the page cache")          \
	X(prefetch_calls, "calls", "asynchronous prefetch requests accepted")                  \
	X(prefetch_bytes, "bytes", "asked for asynchronously")                                 \
	X(prefetch_issued_bytes, "bytes", "submitted by the workers, resident parts included") \
	X(prefetch_cancelled_bytes, "bytes", "dropped from the queue before being submitted")  \
	X(drop_calls, "calls", "drop requests accepted")                                       \
	X(drop_bytes, "bytes", "pages that drop requests removed")                             \
	X(refused_calls, "calls", "prefetch and drop requests refused")                        \
	X(clamped_answers, "calls", "answers cut to the file, to a bound or to a known node")  \
	X(invalid_answers, "calls", "answers that made no sense; the kernel's own were used")  \
	X(evict_calls, "calls", "folios that reclaim asked the policy about")                  \
	X(kept_bytes, "bytes", "kept on the policy's word; again each time reclaim asks")      \
	X(keep_ignored_bytes, "bytes", "keep answers that were not honored")                   \
	X(keep_over_budget_bytes, "bytes", "of these: the policy's budget was used up")        \
	X(keep_overruled_bytes, "bytes", "of these: reclaim made no progress")                 \
	X(evicted_now_bytes, "bytes", "given to reclaim on the policy's word")                 \
	X(pressure_calls, "calls", "times the policy was asked what to drop")                  \
	X(pressure_wanted_bytes, "bytes", "still wanted, summed over these calls")             \
	X(pressure_dropped_bytes, "bytes", "pages that went in answer to pressure")            \
	X(slow_calls, "calls", "of the evict and pressure hooks that took too long")           \
	X(prefetch_lent_bytes, "bytes", "of those asked for: in files that a session lends")

enum pagecache_counter {
#define PAGECACHE_X(name, unit, help) PAGECACHE_COUNTER_##name,
	PAGECACHE_COUNTERS(PAGECACHE_X)
#undef PAGECACHE_X
		PAGECACHE_COUNTER_NR,
};

/*
 * The control device, /dev/pagecache_bpf: root only (CAP_SYS_ADMIN when it is opened).
 * Lists are read one record a call: start with seq 0, each call returns the next record
 * with a larger seq, ENOENT ends the list.
 */
#define PAGECACHE_DEVICE "pagecache_bpf"

struct pagecache_info {
	__u32 abi_version;
	__u32 hooks; /* bit per enum pagecache_hook this module can attach */
	__u32 policies; /* attached now */
	__u32 tags;
	__u64 max_answer_pages; /* bound of one answer */
	__u64 max_extent_pages; /* bound of one prefetch request */
	__u64 max_inflight_pages; /* bound of a policy's queued prefetch */
	__u32 workers_per_node;
	__u32 max_invalid; /* invalid answers after which a policy is ended */
	__u64 max_keep_pages; /* bound of what one policy may keep */
	__u32 max_evict_us; /* microseconds that an evict hook may take, on average */
	__u32 lent; /* files that sessions lend now */
};

#define PAGECACHE_TAG_REPLACE (1U << 0) /* move a file that another policy governs */

struct pagecache_tag_request {
	__s32 fd; /* open file: whoever cannot open it cannot tag it */
	__u32 flags; /* PAGECACHE_TAG_* */
	char policy[PAGECACHE_NAME_LEN];
	char model[PAGECACHE_MODEL_LEN];
	char path[PAGECACHE_PATH_LEN]; /* for people; never used to find the file */
};

/* fd >= 0: that file; else the file named by dev, ino and generation. */
struct pagecache_untag_request {
	__u64 ino;
	__u32 dev_major;
	__u32 dev_minor;
	__u32 generation;
	__s32 fd;
};

/*
 * A session: while a process has the control device open it can lend tagged files, in the order in
 * which they are read.  A policy that governs them can then have pages of one read or dropped on
 * behalf of a reader of another one.  They are taken back one by one, or by closing the device.
 */
struct pagecache_lend_request {
	__s32 fd; /* open for reading; need not stay open */
	__u32 flags; /* 0 */
};

struct pagecache_tag_record {
	__u64 seq; /* in: last seq seen; out: this record's */
	__u64 ino;
	__u64 resident_pages;
	__u32 dev_major;
	__u32 dev_minor;
	__u32 generation;
	__u32 model_id;
	__u32 active; /* 1: its policy is attached */
	__u32 lent; /* sessions that lend it now */
	char policy[PAGECACHE_NAME_LEN];
	char model[PAGECACHE_MODEL_LEN];
	char path[PAGECACHE_PATH_LEN];
};

struct pagecache_policy_record {
	__u64 seq; /* in: last seq seen; out: this record's */
	__u64 attached_ns; /* CLOCK_REALTIME */
	__u64 governed_pages;
	__u64 inflight_pages;
	__u32 hooks; /* bit per enum pagecache_hook the policy defines */
	__u32 tags;
	char name[PAGECACHE_NAME_LEN];
	__u64 kept_pages; /* see pagecache_ctx */
	__u64 keep_max_pages;
	__u64 counters[PAGECACHE_COUNTER_NR];
};

/*
 * Engine agent: the same policies on tracepoints.  Programs and the agent, a process, share maps
 * of these types; what a policy asks for goes to the agent through a ring buffer.
 */
enum pagecache_request_kind {
	PAGECACHE_REQUEST_PREFETCH = 1,
	PAGECACHE_REQUEST_DROP = 2,
	PAGECACHE_REQUEST_CANCEL = 3, /* what is queued for this file and consumer */
	PAGECACHE_REQUEST_EXIT = 4, /* the policy ended itself */
};

struct pagecache_request {
	struct pagecache_file_key file;
	__u64 start; /* page; of an exit: enum pagecache_hook */
	__u64 nr; /* pages */
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u64 cgroup_id; /* of the reader */
	__s64 code; /* of an exit */
	__u32 kind; /* enum pagecache_request_kind */
	__s32 node; /* NUMA node, or PAGECACHE_NODE_ANY */
	__u32 tgid; /* the reader */
	__u32 tid;
	char message[64]; /* of an exit */
};

/* A file that the agent governs: value of the map `tags`. */
struct pagecache_agent_tag {
	__u32 model;
	__u32 device_mib_s; /* what its device can do, MiB a second; 0: not known */
	__u64 done; /* prefetched up to here, in the order of the requests; written by the agent */
	struct pagecache_file_key next; /* the model's file after this one, by name */
	__u64 next_pages; /* 0: there is none */
};

/* What the programs tell the agent: the only element of the map `state`. */
struct pagecache_agent_state {
	__u64 asked; /* pages that policies asked for */
	__s64 governed; /* pages of governed files that came into the cache less those that left */
	__u64 lost; /* requests that found the ring buffer full */
	__u64 ended; /* 1: the policy has ended itself */
};

/* What the agent tells the programs: the only element of the map `orders`. */
struct pagecache_agent_orders {
	__u64 done; /* pages of those asked for that are read, refused or cancelled */
	__u64 max_inflight; /* bound of asked - done */
	__s64 governed; /* pages that governed files had in the cache when they were tagged */
};

/* What the agent hands to the program agent_pressure, once for each file it governs. */
struct pagecache_agent_pressure {
	struct pagecache_file_key file;
	struct pagecache_pressure want;
	__u64 file_pages;
	__u64 resident_pages;
};

/*
 * What a process asks of a file that it has open: the argument of the programs in bpf/files/.  The
 * pages that the file's readers find may be another file's, as those of a container's layer are.
 */
struct pagecache_file_question {
	__u64 address; /* told: where the process has mapped it */
	struct pagecache_file_key key; /* of the file that has the pages */
	__u64 pages; /* of that file, in the page cache */
	__u64 magic; /* of that file's file system */
	__u64 mount_magic; /* of the file system that it was opened on */
	__s32 fd; /* told: its descriptor */
	__u32 level; /* of the user namespace that has mounted that; 0: the initial one */
};

#include "pagecache_observer.h"

#define PAGECACHE_IOC_MAGIC 0xb9
#define PAGECACHE_IOC_INFO _IOR(PAGECACHE_IOC_MAGIC, 0, struct pagecache_info)
#define PAGECACHE_IOC_TAG _IOW(PAGECACHE_IOC_MAGIC, 1, struct pagecache_tag_request)
#define PAGECACHE_IOC_UNTAG _IOW(PAGECACHE_IOC_MAGIC, 2, struct pagecache_untag_request)
#define PAGECACHE_IOC_TAGS _IOWR(PAGECACHE_IOC_MAGIC, 3, struct pagecache_tag_record)
#define PAGECACHE_IOC_POLICIES _IOWR(PAGECACHE_IOC_MAGIC, 4, struct pagecache_policy_record)
#define PAGECACHE_IOC_EXITS _IOWR(PAGECACHE_IOC_MAGIC, 5, struct pagecache_exit_record)
#define PAGECACHE_IOC_LEND _IOW(PAGECACHE_IOC_MAGIC, 6, struct pagecache_lend_request)
#define PAGECACHE_IOC_TAKE_BACK _IOW(PAGECACHE_IOC_MAGIC, 7, struct pagecache_lend_request)

_Static_assert(sizeof(struct pagecache_ctx) == 160, "pagecache_ctx has a hole");
_Static_assert(sizeof(struct pagecache_answer) == 32, "pagecache_answer has a hole");
_Static_assert(sizeof(struct pagecache_pressure) == 24, "pagecache_pressure has a hole");
_Static_assert(sizeof(struct pagecache_exit_record) == 32 + 32 + 96 + 512,
	       "exit record has a hole");
_Static_assert(sizeof(struct pagecache_info) == 64, "pagecache_info has a hole");
_Static_assert(sizeof(struct pagecache_tag_request) == 8 + 32 + 64 + 1024,
	       "tag request has a hole");
_Static_assert(sizeof(struct pagecache_untag_request) == 24, "untag request has a hole");
_Static_assert(sizeof(struct pagecache_lend_request) == 8, "lend request has a hole");
_Static_assert(sizeof(struct pagecache_tag_record) == 48 + 32 + 64 + 1024, "tag record has a hole");
_Static_assert(sizeof(struct pagecache_request) == 24 + 40 + 16 + 64, "request has a hole");
_Static_assert(sizeof(struct pagecache_agent_tag) == 48, "agent tag has a hole");
_Static_assert(sizeof(struct pagecache_agent_state) == 32, "agent state has a hole");
_Static_assert(sizeof(struct pagecache_agent_orders) == 24, "agent orders have a hole");
_Static_assert(sizeof(struct pagecache_agent_pressure) == 64, "agent pressure has a hole");
_Static_assert(sizeof(struct pagecache_file_question) == 64, "file question has a hole");
_Static_assert(sizeof(struct pagecache_policy_record) == 40 + 32 + 16 + 8 * PAGECACHE_COUNTER_NR,
	       "policy record has a hole");

#endif /* PAGECACHE_ABI_H */
