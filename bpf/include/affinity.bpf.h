/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * affinity.bpf.h - the NUMA node that a process wants its pages on: near the accelerator that it
 * loads for.  The controller, the API or `pagecache-bpf hint` writes it; a process that is not
 * there, or has a negative number, is left to what the policy says.
 */
#ifndef AFFINITY_BPF_H
#define AFFINITY_BPF_H

struct consumer_key {
	u32 tgid; /* in the first PID namespace */
};

struct consumer_hint {
	s32 node;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct consumer_key);
	__type(value, struct consumer_hint);
} consumers PAGECACHE_HINT("the NUMA node that a process wants its pages on") SEC(".maps");

static __always_inline s32 consumer_node(u32 tgid, s32 otherwise)
{
	struct consumer_key key = { tgid };
	struct consumer_hint *hint = bpf_map_lookup_elem(&consumers, &key);

	return hint && hint->node >= 0 ? hint->node : otherwise;
}

/* Whether a process has a hint, which says that it is about to load a model. */
static __always_inline bool consumer_is_known(u32 tgid)
{
	return consumer_node(tgid, -1) >= 0;
}

#endif /* AFFINITY_BPF_H */
