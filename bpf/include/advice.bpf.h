/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * advice.bpf.h - what a reader has told the kernel with madvise(2) about the mapping it reads from.
 *
 * Tracepoints of the page cache name the file and the page, not the mapping (vm_area_struct).  It
 * is found among those of the file, in the interval tree i_mmap, as the one of the current process
 * that holds the page.  The tree may change meanwhile: what is read then is wrong at most, and the
 * walk is bounded.
 *
 * FADV_RANDOM is a flag of the open file (FMODE_RANDOM), which a mapping names and the tracepoint
 * of read() does not: there a random reader shows by what it reads.
 */
#ifndef ADVICE_BPF_H
#define ADVICE_BPF_H

#include "core.bpf.h"
#include "loops.bpf.h"

#define ADVICE_MOVES 48 /* along the tree; one for the only mapping of a file */
#define VM_RAND_READ 0x00010000 /* include/linux/mm.h */
#define FMODE_RANDOM (1U << 12) /* include/linux/fs.h */

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct rb_node {
	unsigned long __rb_parent_color;
	struct rb_node *rb_right;
	struct rb_node *rb_left;
};

struct rb_root {
	struct rb_node *rb_node;
};

struct rb_root_cached {
	struct rb_root rb_root;
};

struct address_space___mappings {
	struct rb_root_cached i_mmap;
};

struct mm_struct;

struct file___advised {
	unsigned int f_mode;
};

struct vm_area_struct {
	unsigned long vm_start;
	unsigned long vm_end;
	struct mm_struct *vm_mm;
	unsigned long vm_flags;
	unsigned long vm_pgoff;
	struct file___advised *vm_file;
	struct {
		struct rb_node rb;
	} shared;
};

struct task_struct___reader {
	struct mm_struct *mm;
};
#pragma clang attribute pop

struct advice_walk {
	struct rb_node *node;
	struct rb_node *from; /* the node that was left upwards, if it was */
	struct mm_struct *mm;
	u64 index;
	u32 page_shift;
	bool random;
};

/* One move through the tree: a node before what is below it, on the left before on the right. */
LOOP_STEP(advice_move, ADVICE_MOVES, u32 move, struct advice_walk *walk)
{
	struct rb_node *node = walk->node, *left, *right;
	struct vm_area_struct *area;
	u64 start, pages;

	if (!node)
		return 1;
	left = BPF_CORE_READ(node, rb_left);
	right = BPF_CORE_READ(node, rb_right);
	if (!walk->from) {
		area = (void *)node - bpf_core_field_offset(struct vm_area_struct, shared.rb);
		start = BPF_CORE_READ(area, vm_pgoff);
		pages = (BPF_CORE_READ(area, vm_end) - BPF_CORE_READ(area, vm_start)) >>
			(walk->page_shift & 31);
		if (BPF_CORE_READ(area, vm_mm) == walk->mm && walk->index >= start &&
		    walk->index < start + pages) {
			walk->random = BPF_CORE_READ(area, vm_flags) & VM_RAND_READ ||
				       BPF_CORE_READ(area, vm_file, f_mode) & FMODE_RANDOM;
			return 1;
		}
		if (left || right) {
			walk->node = left ?: right;
			return 0;
		}
	} else if (walk->from == left && right) {
		walk->node = right;
		walk->from = NULL;
		return 0;
	}
	walk->from = node;
	walk->node = (void *)(BPF_CORE_READ(node, __rb_parent_color) & ~3UL);
	return 0;
}

/* Whether the current process has said of its mapping of this page that it reads at random. */
static __noinline bool advised_random(struct address_space *mapping, u64 index, u32 page_shift)
{
	struct address_space___mappings *file = (void *)mapping;
	struct task_struct___reader *task = (void *)bpf_get_current_task();
	struct advice_walk walk = { .index = index, .page_shift = page_shift };

	if (!bpf_core_field_exists(file->i_mmap) ||
	    !bpf_core_field_exists(((struct vm_area_struct *)0)->vm_flags))
		return false;
	walk.mm = BPF_CORE_READ(task, mm);
	walk.node = BPF_CORE_READ(file, i_mmap.rb_root.rb_node);
	LOOP(advice_move, &walk);
	return walk.random;
}

#endif /* ADVICE_BPF_H */
