/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * loops.bpf.h - loops whose body the verifier looks at once, on kernels from 5.13 on.
 *
 * LOOP_STEP(name, most, u32 i, struct context *context) { ... } is one step of at most so many (a
 * constant), which returns 1 to end the loop; LOOP(name, &context) takes them.  That is bpf_loop()
 * where the kernel has it (5.17, commit e6f2dd0f8067).  Before, the elements of a map are gone
 * through, of which there is one for each step (bpf_for_each_map_elem(), 5.13, commit
 * 69c087ba6225).  The way that is not taken is dead code to the verifier, as the condition is a
 * constant when it sees it.
 */
#ifndef LOOPS_BPF_H
#define LOOPS_BPF_H

#include "core.bpf.h"

#define LOOP_MOST 65536 /* steps of any loop */

/* Its elements hold nothing.  User space makes it small where it is not used (event_sources.py). */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, LOOP_MOST);
	__type(key, u32);
	__type(value, u64);
} loop_numbers SEC(".maps");

#define LOOP_STEP(name, most, number, context)                                    \
	enum { name##_most = most };                                              \
	_Static_assert(name##_most <= LOOP_MOST, "the map has too few elements"); \
	static __always_inline long name##_body(number, context);                 \
	static long name(u32 step, void *told)                                    \
	{                                                                         \
		return name##_body(step, told);                                   \
	}                                                                         \
	static long name##_each(void *map, u32 *step, void *value, void *told)    \
	{                                                                         \
		return *step >= name##_most ? 1 : name##_body(*step, told);       \
	}                                                                         \
	static __always_inline long name##_body(number, context)

#define LOOP(name, told)                                             \
	(bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_loop) \
		 ? bpf_loop(name##_most, name, told, 0)              \
		 : bpf_for_each_map_elem(&loop_numbers, name##_each, told, 0))

#endif /* LOOPS_BPF_H */
