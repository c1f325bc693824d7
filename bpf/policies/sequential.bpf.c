// SPDX-License-Identifier: GPL-2.0-only
/*
 * sequential - keeps a growing window ahead of every reader that streams
 *
 * When to use: checkpoints that are read from front to back, by read() or through mmap:
 *	safetensors, transformers, GGUF loaders, cat.  Any number of files; up to 8 places
 *	of one open file are followed at a time.
 *	The window goes on into the next file of the model, by name, once one was read to its
 *	end: always on engine agent, and on engine struct_ops where a session lends the files (a
 *	load of the controller, of the API or of `run`).  One that fits into the window is asked
 *	for as a whole.  A consumer with a node hint is read ahead of from its first access.
 * Limits: it learns the order from the reader, so a loader that jumps between tensors gains
 *	little (see maio).  Nothing is dropped behind the reader; on engine struct_ops what all
 *	readers of a file have passed is evicted first when memory is short, and their windows are
 *	kept (where reclaim cannot be reached the policy does without).  Accesses that do not
 *	stream get the kernel's own readahead, and so do streams beyond the budget.  A window is
 *	at most a quarter of what the reader's memory cgroup may hold.
 */
#include "policy.bpf.h"
#include "stream.bpf.h"

PAGECACHE_READAHEAD(sequential_readahead)
(struct pagecache_ctx *ctx, struct pagecache_answer *answer)
{
	return stream_readahead(ctx, answer);
}

PAGECACHE_EVICT(sequential_evict)
(struct pagecache_ctx *ctx)
{
	return stream_evict(ctx);
}

PAGECACHE_POLICY(sequential, .readahead = (void *)sequential_readahead,
		 .evict = (void *)sequential_evict, .flags = PAGECACHE_OPS_EVICT_OPTIONAL);
