// SPDX-License-Identifier: GPL-2.0-only
/*
 * lent - prefetches in another file than the one that is read
 *
 * When to use: to test what sessions lend: which file comes next, what is refused, who pays.
 * Limits: a test policy.
 */
#include "policy.bpf.h"

PAGECACHE_KNOB(u32, first_page, 0, "pages", 0, 1048576,
	       "where the extent of the other file begins");
PAGECACHE_KNOB(u32, prefetch_pages, 0, "pages", 0, 1048576, "pages of it to prefetch; 0: none");
PAGECACHE_KNOB(u32, drop_pages, 0, "pages", 0, 1048576, "pages of it to drop; 0: none");
PAGECACHE_KNOB(s32, node, -1, "NUMA node", -1, 1023, "node to read both files on; -1: any");
PAGECACHE_KNOB(u32, ino, 0, "inode", 0, 4294967295, "the other file; 0: the one lent after this");
PAGECACHE_KNOB(u32, dev_major, 0, "device", 0, 4095, "its device");
PAGECACHE_KNOB(u32, dev_minor, 0, "device", 0, 1048575, "its device");
PAGECACHE_KNOB(u32, generation, 0, "inode", 0, 4294967295, "its generation");

/* Read by the test: what was returned last, and the flags of the last call. */
s64 next;
s64 prefetched;
s64 dropped;
u64 flags;

PAGECACHE_READAHEAD(lent_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	struct pagecache_file_extent extent = { .start = first_page, .node = node };

	flags = ctx->flags;
	next = bpf_pagecache_next_file(ctx, &extent.file);
	if (ino)
		extent.file = (struct pagecache_file_key){ ino, dev_major, dev_minor, generation };
	if (prefetch_pages) {
		extent.nr = prefetch_pages;
		prefetched = bpf_pagecache_prefetch_file(ctx, &extent);
	}
	if (drop_pages) {
		extent.nr = drop_pages;
		dropped = bpf_pagecache_drop_file(ctx, &extent);
	}
	answer->start = ctx->index;
	answer->nr = 1;
	answer->node = node;
	return PAGECACHE_OVERRIDE;
}

PAGECACHE_POLICY(lent, .readahead = (void *)lent_readahead);
