// SPDX-License-Identifier: GPL-2.0-only
/*
 * identity.bpf.c - which file the kernel's events name when the pages of an open file come and go.
 *
 * stat() tells the file that was opened.  On overlayfs its pages are those of a file in one of the
 * layers, whose device, number and generation no system call tells.  A mapping has that file.  The
 * programs are run by the process that has the file open and mapped; they touch no page and ask
 * nothing of the file system.
 */
#include "kernel.bpf.h"

#include <bpf/bpf_helpers.h>

#include "core.bpf.h"
#include "pagecache_abi.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct file {
	struct inode *f_inode;
	struct address_space *f_mapping;
};

struct rb_node {
	struct rb_node *rb_right;
	struct rb_node *rb_left;
};

struct rb_root {
	struct rb_node *rb_node;
};

/* Until 524e00b36e8c ("mm: remove rb tree", 6.1). */
struct mm_struct {
	struct rb_root mm_rb;
};

struct vm_area_struct {
	unsigned long vm_start;
	unsigned long vm_end;
	struct rb_node vm_rb;
	struct file *vm_file;
};

struct task_struct {
	struct files_struct *files;
	struct mm_struct *mm;
};
#pragma clang attribute pop

static long look(struct task_struct *task, struct vm_area_struct *area,
		 struct pagecache_file_question *question)
{
	struct file *file = BPF_CORE_READ(area, vm_file);
	struct inode *inode = BPF_CORE_READ(file, f_mapping, host);
	struct super_block *sb = BPF_CORE_READ(inode, i_sb);
	u32 dev = device_of(inode, sb);

	question->key.ino = BPF_CORE_READ(inode, i_ino);
	question->key.dev_major = dev >> 20;
	question->key.dev_minor = dev & 0xfffff;
	question->key.generation = BPF_CORE_READ(inode, i_generation);
	question->pages = BPF_CORE_READ(file, f_mapping, nrpages);
	question->magic = BPF_CORE_READ(sb, s_magic);
	return 0;
}

#define TREE_LEVELS 64

/*
 * Look at the area of an address where the kernel has no bpf_find_vma() (before 5.17).  Other
 * threads may change the tree meanwhile; the caller's mapping is there, so it asks again then.
 */
static __always_inline long look_down(struct task_struct *task, u64 address,
				      struct pagecache_file_question *question)
{
	struct rb_node *node = BPF_CORE_READ(task, mm, mm_rb.rb_node);
	struct vm_area_struct *area;

	for (u32 level = 0; node && level < TREE_LEVELS; level++) {
		area = (void *)node - bpf_core_field_offset(struct vm_area_struct, vm_rb);
		if (address < BPF_CORE_READ(area, vm_start))
			node = BPF_CORE_READ(node, rb_left);
		else if (address >= BPF_CORE_READ(area, vm_end))
			node = BPF_CORE_READ(node, rb_right);
		else
			return look(task, area, question);
	}
	return -16; /* EBUSY */
}

/* Whose pages are at an address; returns a negative error, -EBUSY if it has to be asked again. */
SEC("syscall") int pages_of(struct pagecache_file_question *args)
{
	struct pagecache_file_question question = {};
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	long err;

	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_find_vma))
		err = bpf_find_vma((void *)task, args->address, look, &question, 0);
	else
		err = look_down(task, args->address, &question);
	args->key = question.key;
	args->pages = question.pages;
	args->magic = question.magic;
	return err;
}

/* On what file system a descriptor was opened; returns a negative error. */
SEC("syscall") int mount_of(struct pagecache_file_question *args)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file **files = BPF_CORE_READ(table, fd), *file = NULL;
	u32 fd = args->fd;
	struct super_block *sb;

	if (fd >= BPF_CORE_READ(table, max_fds) ||
	    bpf_probe_read_kernel(&file, sizeof(file), files + fd) || !file)
		return -9; /* EBADF */
	sb = BPF_CORE_READ(file, f_inode, i_sb);
	args->mount_magic = BPF_CORE_READ(sb, s_magic);
	args->level = BPF_CORE_READ(sb, s_user_ns, level);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
