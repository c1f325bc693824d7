/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * access_events.bpf.h - programs that are told what readers read and map, from whatever tells it.
 *
 * Linux 6.12 has tracepoints for that.  Before, the same is told where the same functions return:
 * fexit programs, which see their arguments and what they return.  User space loads one of them for
 * each event (pagecache_bpf/kernel/event_sources.py); those whose section begins with '?' libbpf
 * leaves out otherwise, as a function that is not there would have the whole object refused.
 */
#ifndef ACCESS_EVENTS_BPF_H
#define ACCESS_EVENTS_BPF_H

#include "core.bpf.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct file___read {
	struct address_space *f_mapping;
};

struct kiocb {
	struct file___read *ki_filp;
	s64 ki_pos;
};

struct iov_iter {
	unsigned long count;
};

struct vm_area_struct___read {
	struct file___read *vm_file;
};

struct vm_fault {
	struct vm_area_struct___read *vma;
	unsigned long pgoff;
	void *pte;
};
#pragma clang attribute pop

/* Pages [from, to) of a file. */
struct accessed {
	struct address_space *mapping;
	u64 from;
	u64 to;
};

/*
 * filemap_get_pages() returns.  How much is read is told by the iterator on older kernels (6.1),
 * and by a number, with one argument more, on newer ones (6.5).  False: it has got none.
 */
static __always_inline bool event_read(u64 *args, u32 page_shift, struct accessed *a)
{
	struct kiocb *call = (void *)args[0];
	u64 page = 1ULL << (page_shift & 31), told = 0, at;

	bool ask = bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_get_func_arg);

	/* Before it could be asked (5.17), all kernels had three arguments, and then what it
	 * returns. */
	if (!ask)
		told = args[3];
	else if (bpf_get_func_ret(args, &told))
		return false;
	if ((s32)told < 0)
		return false;
	if (!ask || bpf_get_func_arg_cnt(args) == 3)
		told = LOAD((struct iov_iter *)args[1], count);
	else /* not args[1]: the verifier has it as the type that this kernel's function takes */
		bpf_get_func_arg(args, 1, &told);
	at = LOAD(call, ki_pos);
	a->mapping = LOAD(call, ki_filp, f_mapping);
	a->from = at >> (page_shift & 31);
	a->to = (at + told + page - 1) >> (page_shift & 31);
	return true;
}

static __always_inline struct address_space *event_mapping(struct vm_fault *fault)
{
	return LOAD(fault, vma, vm_file, f_mapping);
}

/*
 * filemap_map_pages() returns.  False: it has found none, or has mapped a huge page, of which the
 * tracepoint does not tell, either; then it has not come to the page table.
 */
static __always_inline bool event_mapped(u64 *args, struct accessed *a)
{
	struct vm_fault *fault = (void *)args[0];

	if (!LOAD(fault, pte))
		return false;
	a->mapping = event_mapping(fault);
	a->from = args[1];
	a->to = args[2] + 1;
	return true;
}

/* filemap_fault() begins. */
static __always_inline void event_fault(u64 *args, struct accessed *a)
{
	struct vm_fault *fault = (void *)args[0];

	a->mapping = event_mapping(fault);
	a->from = LOAD(fault, pgoff);
	a->to = a->from + 1;
}

/*
 * The programs of the events, one of which is loaded for each.
 *
 * name: the beginning of their names.
 * page_shift: of the machine.
 * reads, maps, faults: called with the mapping, the first page and the one after the last: what a
 * read() has got some of, what is mapped around a fault, what is faulted.
 */
#define ACCESS_PROGRAMS(name, page_shift, reads, maps, faults)                \
	SEC("?raw_tp/mm_filemap_get_pages") int name##_get_pages(u64 *args)   \
	{                                                                     \
		return reads((void *)args[0], args[1], args[2] + 1);          \
	}                                                                     \
	SEC("?fexit/filemap_get_pages") int name##_get_pages_fexit(u64 *args) \
	{                                                                     \
		struct accessed a = {};                                       \
                                                                              \
		if (!event_read(args, page_shift, &a))                        \
			return 0;                                             \
		return reads(a.mapping, a.from, a.to);                        \
	}                                                                     \
	SEC("?raw_tp/mm_filemap_map_pages") int name##_map_pages(u64 *args)   \
	{                                                                     \
		return maps((void *)args[0], args[1], args[2] + 1);           \
	}                                                                     \
	SEC("?fexit/filemap_map_pages") int name##_map_pages_fexit(u64 *args) \
	{                                                                     \
		struct accessed a = {};                                       \
                                                                              \
		if (!event_mapped(args, &a))                                  \
			return 0;                                             \
		return maps(a.mapping, a.from, a.to);                         \
	}                                                                     \
	SEC("?raw_tp/mm_filemap_fault") int name##_fault(u64 *args)           \
	{                                                                     \
		return faults((void *)args[0], args[1], args[1] + 1);         \
	}                                                                     \
	SEC("?fentry/filemap_fault") int name##_fault_fentry(u64 *args)       \
	{                                                                     \
		struct accessed a = {};                                       \
                                                                              \
		event_fault(args, &a);                                        \
		return faults(a.mapping, a.from, a.to);                       \
	}

#endif /* ACCESS_EVENTS_BPF_H */
