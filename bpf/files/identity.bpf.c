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

struct vm_area_struct {
	struct file *vm_file;
};

struct task_struct {
	struct files_struct *files;
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

/* Whose pages are at an address; returns a negative error, -EBUSY if it has to be asked again. */
SEC("syscall") int pages_of(struct pagecache_file_question *args)
{
	struct pagecache_file_question question = {};
	long err =
		bpf_find_vma((void *)bpf_get_current_task_btf(), args->address, look, &question, 0);

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
