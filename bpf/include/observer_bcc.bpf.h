/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * observer_bcc.bpf.h - what observer.bpf.h needs of its compiler, where that is BCC on the machine.
 *
 * The kernel's headers say where everything lies.  Maps are made before by user space, which
 * passes their descriptors and all constants as macros.  BCC knows no callbacks, so loops are
 * written out, and areas of memory cannot be looked for: huge pages are not seen to be mapped.
 */
#ifndef OBSERVER_BCC_BPF_H
#define OBSERVER_BCC_BPF_H

#include <linux/sched.h>
#include <linux/fs.h>
#include <linux/fdtable.h>
#include <linux/pagemap.h>
#include <linux/ptrace.h>
#include <linux/xarray.h>
#include "pagecache_abi.h"

#define folio_flags observer_folio_flags

#if defined(__TARGET_ARCH_arm64) || defined(__aarch64__) || defined(bpf_target_arm64)
#define TOP_OF_KERNEL_STACK_PADDING 0
#define PT_NUMBER syscallno
#define PT_1 regs[0]
#define PT_4 regs[3]
#define PT_5 regs[4]
#else
#define PT_NUMBER orig_ax
#define PT_1 di
#define PT_4 r10
#define PT_5 r8
#endif

#define MAP(map) ((void *)bpf_pseudo_fd(1, FD_##map))
#define MAP_LOOKUP(map, key) bpf_map_lookup_elem_(bpf_pseudo_fd(1, FD_##map), (void *)(key))
#define MAP_UPDATE(map, key, value, flags) \
	bpf_map_update_elem_(bpf_pseudo_fd(1, FD_##map), (void *)(key), (void *)(value), flags)
#define RING_OUTPUT(ring, data, size) bpf_ringbuf_output(MAP(ring), data, size, 0)

#define READ_1(pointer, a)                                                             \
	({                                                                             \
		typeof((pointer)->a) read_value;                                       \
		bpf_probe_read_kernel(&read_value, sizeof(read_value), &(pointer)->a); \
		read_value;                                                            \
	})
#define READ_2(pointer, a, b) READ_1(READ_1(pointer, a), b)
#define READ_N(pointer, a, b, name, ...) name
#define READ(pointer, ...) READ_N(pointer, __VA_ARGS__, READ_2, READ_1)(pointer, __VA_ARGS__)

/*
 * A bit field has no address, so what lies around it is copied, and read through a pointer to
 * where the whole would begin.
 */
#define BITS_START (__builtin_offsetof(struct task_struct, personality) + 4)
#define BITS_END __builtin_offsetof(struct task_struct, atomic_flags)
#define in_iowait(task)                                                                            \
	({                                                                                         \
		u64 around[(BITS_END - BITS_START + 7) / 8] = {};                                  \
		bpf_probe_read_kernel(around, BITS_END - BITS_START, (void *)(task) + BITS_START); \
		((struct task_struct *)((void *)around - BITS_START))->in_iowait;                  \
	})
#define DEVICE_OF(inode, sb) READ_1(sb, s_dev) /* of all subvolumes of a btrfs */
#define PAGES_OF(mapping) READ_1(mapping, i_pages.xa_head)
#define SLOTS_OFFSET __builtin_offsetof(struct xa_node, slots)
#define FOLIO_BIT(name) (1ULL << PG_##name)
#define READAHEAD_BIT FOLIO_BIT(readahead)

#define WALK_MAX 33 /* the verifier goes through every step */
#define LOOP_STEP(name, most, number, context) \
	enum { name##_most = most };           \
	static __always_inline long name(number, context)
#define LOOP(name, context)                                                                   \
	do {                                                                                  \
		u32 walk_max =                                                                \
			name##_most == 64 || name##_most < WALK_MAX ? name##_most : WALK_MAX; \
		_Pragma("clang loop unroll(disable)") for (u32 i_ = 0; i_ < walk_max; i_++)   \
		{                                                                             \
			if (name(i_, context))                                                \
				break;                                                        \
		}                                                                             \
	} while (0)
#define FIND_AREA(address, fn, context) (-1)

static __always_inline struct inode *host_of(struct address_space *mapping, u64 *number)
{
	struct inode *inode = READ_1(mapping, host);

	*number = READ_1(inode, i_ino);
	return inode;
}

static __always_inline struct task_struct *current_task(void)
{
	return (void *)bpf_get_current_task();
}

/* What bpf_task_pt_regs() says, which wants BTF. */
static __always_inline void *user_regs(void)
{
	void *stack = READ_1(current_task(), stack);

	return stack + THREAD_SIZE - TOP_OF_KERNEL_STACK_PADDING - sizeof(struct pt_regs);
}

static __always_inline s64 syscall_number(void)
{
	return READ_1((struct pt_regs *)user_regs(), PT_NUMBER);
}

static __always_inline u64 syscall_argument(u32 number)
{
	struct pt_regs *regs = user_regs();

	return number == 1   ? READ_1(regs, PT_1)
	       : number == 4 ? READ_1(regs, PT_4)
			     : READ_1(regs, PT_5);
}

static __always_inline u64 read_calls(struct task_struct *task)
{
	return READ_1(task, ioac.syscr);
}

static __always_inline u32 links_of(struct inode *inode)
{
	return READ_1(inode, i_nlink);
}

static __always_inline u64 observer_folio_flags(struct folio *folio)
{
	u64 flags;

	bpf_probe_read_kernel(&flags, sizeof(flags), folio);
	return flags;
}

static __always_inline struct address_space *mapping_of(struct folio *folio)
{
	return READ_1(folio, mapping);
}

static __always_inline u64 index_of(struct folio *folio)
{
	return READ_1(folio, index);
}

static __always_inline u64 folio_pages(struct folio *folio)
{
	if (!(folio_flags(folio) >> PG_head & 1))
		return 1;
	return 1ULL << (READ_1(folio, _flags_1) & 31);
}

#endif /* OBSERVER_BCC_BPF_H */
