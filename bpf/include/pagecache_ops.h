/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * pagecache_ops.h - the struct_ops type, shared by the module and the policies.
 *
 * Members are found by name in the module's BTF.  Every hook cannot sleep and may be absent; at
 * least one besides init and exit must be there.  They run in the context of the task that reads
 * (removed: also with the page-cache lock held); evict in that of the task that reclaims memory,
 * which may be any; pressure in a worker.
 */
#ifndef PAGECACHE_OPS_H
#define PAGECACHE_OPS_H

#include "pagecache_abi.h"

/* pagecache_ops.flags */
#define PAGECACHE_OPS_EVICT_OPTIONAL \
	(1U << 0) /* attach without the evict hook where it cannot be had */

struct pagecache_ops {
	/* Attach fails with the value returned when it is negative. */
	__s32 (*init)(struct pagecache_ctx *ctx);
	/* The policy is gone: why. */
	void (*exit)(struct pagecache_exit_record *record);
	/* Returns enum pagecache_verdict. */
	__s32 (*readahead)(struct pagecache_ctx *ctx, struct pagecache_answer *answer);
	void (*access)(struct pagecache_ctx *ctx);
	void (*added)(struct pagecache_ctx *ctx);
	void (*removed)(struct pagecache_ctx *ctx);
	/* Returns enum pagecache_eviction. */
	__s32 (*evict)(struct pagecache_ctx *ctx);
	void (*pressure)(struct pagecache_ctx *ctx, struct pagecache_pressure *want);

	/* access is called at most once for this many bytes read in order; 0: every time. */
	__u64 access_step_bytes;
	__u32 abi_version;
	__u32 flags; /* PAGECACHE_OPS_* */
	char name[PAGECACHE_NAME_LEN];
};

#endif /* PAGECACHE_OPS_H */
