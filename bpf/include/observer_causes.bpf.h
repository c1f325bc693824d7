/* SPDX-License-Identifier: GPL-2.0-only */
/* observer_causes.bpf.h - why pages of a tagged file come into the cache, and why they leave it. */
#ifndef OBSERVER_CAUSES_BPF_H
#define OBSERVER_CAUSES_BPF_H

static __always_inline enum added_by added_by(struct pagecache_observed_file *file,
					      struct task_state *state, u64 index, u64 nr)
{
	s64 number;

	if (state_by_us(state, current_task()))
		return BY_US;
	if (state->fault_pending == FAULT_TOLD && state->fault_slot == file->slot &&
	    state->fault_index >= index && state->fault_index < index + nr)
		return BY_FAULT;
	number = syscall_number();
	if (number == observer_sys_readahead || number == observer_sys_fadvise ||
	    number == observer_sys_madvise)
		return BY_REQUEST;
	return number == -1 ? BY_OTHERS : BY_READ;
}

/* Remember what a call adds. */
static __always_inline void extend_added(struct task_state *state, u32 slot, u64 index, u64 nr)
{
	u64 call = read_calls(current_task());

	if (state->add_slot != slot || state->add_call != call ||
	    state->add_from >= state->add_to) {
		state->add_slot = slot;
		state->add_call = call;
		state->add_from = index;
		state->add_to = index + nr;
		return;
	}
	if (index < state->add_from)
		state->add_from = index;
	if (index + nr > state->add_to)
		state->add_to = index + nr;
}

/* Why does this task take pages of a file out of the cache? */
static __always_inline u32 eviction_cause(struct task_state *state, struct inode *inode, u64 index)
{
	struct task_struct *task = current_task();
	u32 flags = READ(task, flags);

	/* A deleted file goes with its last user, a shortened one has its new size already. */
	if (!links_of(inode) || index >= file_pages_of(inode))
		return PAGECACHE_OBSERVED_evicted_truncate_bytes;
	if (state_by_us(state, task))
		return PAGECACHE_OBSERVED_evicted_drop_bytes;
	if (flags & PF_MEMALLOC)
		return PAGECACHE_OBSERVED_evicted_reclaim_bytes;
	if (!(flags & PF_KTHREAD) && syscall_number() == observer_sys_fadvise)
		return PAGECACHE_OBSERVED_evicted_fadvise_bytes;
	return PAGECACHE_OBSERVED_evicted_other_bytes;
}

#endif /* OBSERVER_CAUSES_BPF_H */
