/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * pagecache_template.h - files and I/O templates, as BPF programs and user space share them.
 *
 * Included by pagecache_abi.h.  It is a file of its own since policies look the module's types up
 * in its type information, where most of these are not.
 */
#ifndef PAGECACHE_TEMPLATE_H
#define PAGECACHE_TEMPLATE_H

#if !defined(__bpf__) && !defined(PAGECACHE_ENGINE_SIMULATE)
#include <linux/types.h>
#endif

struct pagecache_file_key {
	__u64 ino;
	__u32 dev_major;
	__u32 dev_minor;
	__u32 generation;
	__u32 reserved;
};

/* What is asked of a file that is named: of the module, one that a session lends. */
struct pagecache_file_extent {
	struct pagecache_file_key file;
	__u64 start; /* page */
	__u64 nr; /* pages */
	__s32 node; /* NUMA node, or PAGECACHE_NODE_ANY */
	__u32 mark_step; /* pages from one readahead marker to the next; 0: none */
};

/*
 * I/O templates as policies see them (bpf/include/template.bpf.h).  User space fills the arrays
 * before the hash template_files, by which a policy finds a template.  Numbers of pages are
 * those of this machine; a position is counted in pages from a consumer's first step.
 */
#define PAGECACHE_TEMPLATE_NONE (~0U)
#define PAGECACHE_TEMPLATE_SHARED_FIRST 1
#define PAGECACHE_TEMPLATE_SHARED_LAST 2
#define PAGECACHE_TEMPLATE_WHOLE_FIRST 4
#define PAGECACHE_TEMPLATE_WHOLE_LAST 8

/* template_files: what a file is to the templates. */
struct pagecache_template_file {
	__u32 file; /* index of template_targets */
	__u32 model; /* index of template_models */
	__u32 spans; /* index of template_spans: one for each consumer of the model, from here */
	__u32 reserved;
};

/* template_models: one template.  The second half is the policy's. */
struct pagecache_template_model {
	__u32 first_consumer; /* index of template_consumers */
	__u32 nr_consumers; /* 0: not used */
	__u32 source; /* enum pagecache_template_source */
	__u32 failed; /* 1: dropped, since it was wrong too often */
	__u64 followed; /* pages that were accessed as the template says */
	__u64 strayed; /* pages accessed otherwise, or prefetched before a jump and passed over */
	__u64 jumps; /* times that a consumer went on elsewhere */
	char name[64];
	__u32 load; /* number of the present one: grows when a consumer that has read begins anew */
	__u32 reserved;
};

enum pagecache_template_source {
	PAGECACHE_TEMPLATE_SOURCE_DERIVED = 1,
	PAGECACHE_TEMPLATE_SOURCE_RECORDED = 2,
	PAGECACHE_TEMPLATE_SOURCE_IMPORTED = 3,
};

/* template_consumers: whose order it is.  The second half is the policy's. */
struct pagecache_template_consumer {
	__u32 first_step; /* index of template_steps */
	__u32 nr_steps;
	__u32 tgid; /* who reads as this consumer; 0: nobody yet */
	__u32 load; /* the load that it has begun last */
	__u64 time_ns; /* when it was seen last, */
	__u64 position; /* and where */
};

/* template_targets: a file that can be prefetched.  The second half is the policy's. */
struct pagecache_template_target {
	struct pagecache_file_key key;
	__u64 pages;
	__u64 asked; /* pages, in this generation */
	__u32 generation; /* grows when what was asked for may be gone */
	__u32 load; /* what was asked for before this load is not counted on */
};

/* template_spans: the part of template_index that is of one file and consumer. */
struct pagecache_template_span {
	__u32 first;
	__u32 nr;
};

/* template_index: from a page to a step; sorted by page within a span. */
struct pagecache_template_entry {
	__u32 start; /* page */
	__u32 step; /* index of template_steps */
};

/* template_steps: what a consumer reads, one extent after the other. */
struct pagecache_template_step {
	__u32 extent; /* index of template_extents */
	__u32 next; /* the consumer's next step in the same file, or PAGECACHE_TEMPLATE_NONE */
	__u64 before; /* position */
};

/*
 * template_extents: shared by the consumers that want the same.  asked, generation, load and passed
 * are the policy's.
 */
struct pagecache_template_extent {
	__u32 file; /* index of template_targets */
	__u32 start; /* pages, */
	__u32 end; /* without this one */
	__u32 users; /* steps that lead here */
	__u32 asked; /* pages from start on that have been asked for, */
	__u32 generation; /* if this is the file's */
	__u32 load; /* the load that passed is of */
	__u32 edges; /* _SHARED_*: pages of another extent, too; _WHOLE_*: huge pages all wanted */
	__u32 before; /* extent that brings in the huge page where this one begins, or _NONE */
	__u32 behind; /* the same for its end */
	__u64 passed; /* users that have come to its end: bit per consumer of the model */
};

_Static_assert(sizeof(struct pagecache_file_key) == 24, "file key has a hole");
_Static_assert(sizeof(struct pagecache_file_extent) == 48, "file extent has a hole");
_Static_assert(sizeof(struct pagecache_template_file) == 16, "template file has a hole");
_Static_assert(sizeof(struct pagecache_template_model) == 48 + 64, "template model has a hole");
_Static_assert(sizeof(struct pagecache_template_consumer) == 32, "template consumer has a hole");
_Static_assert(sizeof(struct pagecache_template_target) == 48, "template target has a hole");
_Static_assert(sizeof(struct pagecache_template_span) == 8, "template span has a hole");
_Static_assert(sizeof(struct pagecache_template_entry) == 8, "template entry has a hole");
_Static_assert(sizeof(struct pagecache_template_step) == 16, "template step has a hole");
_Static_assert(sizeof(struct pagecache_template_extent) == 48, "template extent has a hole");

#endif /* PAGECACHE_TEMPLATE_H */
