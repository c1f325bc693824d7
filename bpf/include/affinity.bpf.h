/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * affinity.bpf.h - the NUMA node that a process wants its pages on: near the accelerator that it
 * loads for.  The controller writes it; a process that is not there, or has a negative number, is
 * left to what the policy says.
 */
#ifndef AFFINITY_BPF_H
#define AFFINITY_BPF_H

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, u32); /* process, in the first PID namespace */
	__type(value, s32); /* node */
} consumers SEC(".maps");

static __always_inline s32 consumer_node(u32 tgid, s32 otherwise)
{
	s32 *node = bpf_map_lookup_elem(&consumers, &tgid);

	return node && *node >= 0 ? *node : otherwise;
}

#endif /* AFFINITY_BPF_H */
