/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * misses_only.bpf.h - what a policy learns of a reader on engines that ask it about misses and
 * markers only: struct_ops and the simulator.  Engine agent tells of each access
 * (agent_calls.bpf.h).
 */
#ifndef MISSES_ONLY_BPF_H
#define MISSES_ONLY_BPF_H

/* What a policy answers is read in the kernel's place, and nothing beside it. */
#define PAGECACHE_KERNEL_READS 0

/* Each question tells something: hits are not told. */
#define PAGECACHE_TELLS_HITS 0

/* The kernels of the module have bpf_loop(), and the simulator has its own; see loops.bpf.h. */
#define LOOP_STEP(name, most, number, context) \
	enum { name##_most = most };           \
	static long name(number, context)
#define LOOP(name, told) bpf_loop(name##_most, name, told, 0)

/* Neither what a reader advised nor each of its accesses is told here. */
static __always_inline bool pagecache_reads_at_random(const struct pagecache_ctx *ctx)
{
	return false;
}

static __always_inline u64 pagecache_touched(const struct pagecache_ctx *ctx)
{
	return PAGECACHE_UNKNOWN;
}

static __always_inline void pagecache_forget_reader(struct pagecache_ctx *ctx)
{
}

#endif /* MISSES_ONLY_BPF_H */
