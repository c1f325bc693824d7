/* SPDX-License-Identifier: GPL-2.0-only */
/* observer_core.bpf.h - what observer.bpf.h needs of its compiler, where that is clang (CO-RE). */
#ifndef OBSERVER_CORE_BPF_H
#define OBSERVER_CORE_BPF_H

#include "kernel.bpf.h"
#include <bpf/bpf_helpers.h>
#include "core.bpf.h"
#include "loops.bpf.h"
#include "pagecache_abi.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct task_io_accounting {
	u64 syscr;
};

struct task_struct {
	unsigned int flags;
	int pid;
	int tgid;
	u64 start_time;
	unsigned int in_iowait : 1;
	struct task_io_accounting ioac;
	struct files_struct *files;
};

struct file {
	s64 f_pos;
	struct inode *f_inode;
	struct address_space *f_mapping;
};

struct vm_area_struct {
	unsigned long vm_start;
	unsigned long vm_end;
	unsigned long vm_flags;
	unsigned long vm_pgoff;
	struct file *vm_file;
};

struct pt_regs___x86 {
	unsigned long di;
	unsigned long r8;
	unsigned long r10;
	unsigned long orig_ax;
};

struct pt_regs___arm64 {
	u64 regs[31];
	s32 syscallno;
};

struct inode___links {
	unsigned int i_nlink;
};

struct xarray {
	void *xa_head;
};

struct address_space___pages {
	struct xarray i_pages;
};

struct xa_node {
	unsigned char shift;
	void *slots[64];
};
#pragma clang attribute pop

#define PF_MEMALLOC 0x00000800
#define PF_KTHREAD 0x00200000
#define VM_NOHUGEPAGE 0x40000000

/* Set by user space before it loads this. */
const volatile u32 observer_page_shift = 12;
const volatile u32 observer_moves; /* cursor moves: 0: none is told, 2: every one */
const volatile u64 observer_silent_ns = 10000000; /* 1: one, then none of that file for so long */
const volatile u64 observer_record_tick_ns; /* a recording: the interval of time; 0: none is made */
const volatile u64 observer_record_start_ns; /* when it began, CLOCK_MONOTONIC */
const volatile u32 observer_record_cell_shift; /* pages of a cell, as a power of 2 */
const volatile u32 observer_whole_folios; /* 1: a fault maps large folios whole */
const volatile u64 observer_pidns_dev;
const volatile u64 observer_pidns_ino;
/* Numbers of system calls of this architecture. */
const volatile s64 observer_sys_readahead = -2;
const volatile s64 observer_sys_fadvise = -2;
const volatile s64 observer_sys_madvise = -2;
const volatile s64 observer_sys_mmap = -2;
const volatile s64 observer_sys_read = -2;
const volatile s64 observer_sys_readv = -2;
const volatile s64 observer_sys_pread = -2;
const volatile s64 observer_sys_preadv = -2;
const volatile s64 observer_sys_preadv2 = -2;

#define OBSERVER_MAP(map_type, name, entries, flags, key_type, value_type) \
	struct {                                                           \
		__uint(type, map_type);                                    \
		__uint(max_entries, entries);                              \
		__uint(map_flags, flags);                                  \
		__type(key, key_type);                                     \
		__type(value, value_type);                                 \
	} name SEC(".maps")

#define MAP_LOOKUP(map, key) bpf_map_lookup_elem(&map, key)
#define MAP_UPDATE(map, key, value, flags) bpf_map_update_elem(&map, key, value, flags)
#define READ(pointer, ...) LOAD(pointer, __VA_ARGS__)
#define DEVICE_OF(inode, sb) device_of(inode, sb)
#define RING_OUTPUT(ring, data, size) bpf_ringbuf_output(&ring, data, size, 0)
#define PAGES_OF(mapping) LOAD((struct address_space___pages *)(mapping), i_pages.xa_head)
#define SLOTS_OFFSET bpf_core_field_offset(struct xa_node, slots)
#define FOLIO_BIT(name) (1ULL << bpf_core_enum_value(enum pageflags, PG_##name))
/* 5.15 has it under the name of the other that the bit stands for. */
#define READAHEAD_BIT                                                                    \
	(bpf_core_enum_value_exists(enum pageflags, PG_readahead) ? FOLIO_BIT(readahead) \
								  : FOLIO_BIT(reclaim))
/* Before bpf_find_vma() (5.17) no area is found: huge pages are not seen to be mapped. */
#define FIND_AREA(address, fn, context)                                                      \
	(bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_find_vma)                     \
		 ? bpf_find_vma((void *)bpf_get_current_task_btf(), address, fn, context, 0) \
		 : -1)
#define OBSERVE(tracepoint, name) SEC("raw_tp/" #tracepoint) int name(u64 *args)

static __always_inline bool in_iowait(struct task_struct *task)
{
	if (DIRECT_LOADS) {
		task = bpf_rdonly_cast(task, bpf_core_type_id_kernel(struct task_struct));
		return BPF_CORE_READ_BITFIELD(task, in_iowait);
	}
	return BPF_CORE_READ_BITFIELD_PROBED(task, in_iowait);
}

static __always_inline struct task_struct *current_task(void)
{
	return (void *)bpf_get_current_task();
}

static __always_inline void *user_regs(void)
{
	return (void *)bpf_task_pt_regs((void *)bpf_get_current_task_btf());
}

/* Number of the system call that this task is in, -1: none. */
static __always_inline s64 syscall_number(void)
{
	struct pt_regs___x86 *x86 = user_regs();
	struct pt_regs___arm64 *arm64 = (void *)x86;

	if (bpf_core_field_exists(x86->orig_ax))
		return LOAD(x86, orig_ax);
	if (bpf_core_field_exists(arm64->syscallno))
		return LOAD(arm64, syscallno);
	return -3;
}

/* Its arguments 1, 4 and 5. */
static __always_inline u64 syscall_argument(u32 number)
{
	struct pt_regs___x86 *x86 = user_regs();
	struct pt_regs___arm64 *arm64 = (void *)x86;

	if (bpf_core_field_exists(x86->orig_ax))
		return number == 1 ? LOAD(x86, di) : number == 4 ? LOAD(x86, r10) : LOAD(x86, r8);
	return number == 1   ? LOAD(arm64, regs[0])
	       : number == 4 ? LOAD(arm64, regs[3])
			     : LOAD(arm64, regs[4]);
}

/* Read calls that a task has finished; 0 on kernels that do not count them. */
static __always_inline u64 read_calls(struct task_struct *task)
{
	if (!bpf_core_field_exists(task->ioac.syscr))
		return 0;
	return LOAD(task, ioac.syscr);
}

static __always_inline u32 links_of(struct inode *inode)
{
	struct inode___links *links = (void *)inode;

	return LOAD(links, i_nlink);
}

#endif /* OBSERVER_CORE_BPF_H */
