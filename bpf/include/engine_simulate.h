/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * engine_simulate.h - policies in an ordinary process, for `pagecache-bpf simulate`.
 *
 * The same source is compiled for this machine into a shared object together with a model of the
 * page cache (simulate_cache.h), which asks the hooks while a trace is replayed.  Maps and helpers
 * are in simulate_maps.h; time is the trace's.  There is one CPU and nothing is concurrent.
 *
 * This header takes the place of libbpf's bpf_helpers.h; a helper that is not here is a compile
 * error that names it.
 */
#ifndef ENGINE_SIMULATE_H
#define ENGINE_SIMULATE_H

#define __BPF_HELPERS__

#define SEC(name)
#define __always_inline inline __attribute__((always_inline))
#define PAGECACHE_STEP static __always_inline /* a part of a policy: there is no verifier */
#define __uint(name, value) int (*name)[value]
#define __type(name, type) typeof(type) *name
#define __ulong(name, value) int (*name)[value]
#define __weak __attribute__((weak))
#define __noinline __attribute__((noinline))
#define barrier_var(x) ((void)(x))
#define bpf_barrier() ((void)0)
#define offsetof(type, member) __builtin_offsetof(type, member)

struct bpf_spin_lock {
	u32 taken;
};

#include "simulate_maps.h"

#define SIM_SHAPE(map)                                          \
	((struct sim_shape){                                    \
		.type = sizeof(*(map)->type) / sizeof(int),     \
		.key_size = sizeof(*(map)->key),                \
		.value_size = sizeof(*(map)->value),            \
		.max_entries = sizeof(*(map)->max_entries) / 4, \
	})
#define bpf_map_lookup_elem(map, key) sim_map_lookup(map, SIM_SHAPE(map), key)
#define bpf_map_update_elem(map, key, value, flags) \
	sim_map_update(map, SIM_SHAPE(map), key, value, flags)
#define bpf_map_delete_elem(map, key) sim_map_delete(map, SIM_SHAPE(map), key)
#define bpf_for_each_map_elem(map, callback, ctx, flags) \
	sim_for_each(map, SIM_SHAPE(map), (void *)(callback), ctx)

#include "simulate_replay.h"

#define bpf_ktime_get_ns() (sim.now_ns)
#define bpf_ktime_get_boot_ns() (sim.now_ns)
#define bpf_get_smp_processor_id() 0U
#define bpf_get_numa_node_id() 0L
#define bpf_get_current_pid_tgid() ((u64)sim.tgid << 32 | sim.tgid)
#define bpf_get_current_cgroup_id() (sim.cgroup_id)
#define bpf_get_current_ancestor_cgroup_id(level) sim_ancestor(level)
#define bpf_get_prandom_u32() sim_random()
#define bpf_spin_lock(lock) ((void)(lock))
#define bpf_spin_unlock(lock) ((void)(lock))
#define bpf_printk(...) ((void)0)

static inline long bpf_loop(u32 nr, void *callback, void *ctx, u64 flags)
{
	long (*step)(u64, void *) = callback;
	u32 i;

	for (i = 0; i < nr; i++)
		if (step(i, ctx))
			return i + 1;
	return i;
}

#define PAGECACHE_HOOK_1(ret, fn, type) static ret fn
#define PAGECACHE_HOOK_2(ret, fn, type1, type2) static ret fn

#define PAGECACHE_TABLE(policy, ...)                           \
	static const struct pagecache_ops policy##_ops = {     \
		__VA_ARGS__,                                   \
		.abi_version = PAGECACHE_ABI_VERSION,          \
		.name = #policy,                               \
	};                                                     \
	void sim_policy(bool on)                               \
	{                                                      \
		sim.ops = on ? &policy##_ops : &sim_no_policy; \
	}                                                      \
	_Static_assert(sizeof(policy##_ops) > 0, "needs a table")

#endif /* ENGINE_SIMULATE_H */
