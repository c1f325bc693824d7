// SPDX-License-Identifier: GPL-2.0-only
/* every_access - is told of every access and does nothing: what the access hook costs. */
#include "policy.bpf.h"

PAGECACHE_READAHEAD(every_access_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return PAGECACHE_DEFAULT;
}

PAGECACHE_ACCESS(every_access_access)
(struct pagecache_ctx *ctx)
{
}

PAGECACHE_POLICY(every_access, .readahead = (void *)every_access_readahead,
		 .access = (void *)every_access_access);
