// SPDX-License-Identifier: GPL-2.0-only
/*
 * hooks_access.c - the access hook: a range of a tagged file is read or faulted.
 *
 * The functions are watched, not redirected.  Tracepoints exist at about the same places,
 * but they tell the mapping only; a policy that prefetches needs the open file.  Pages
 * that are mapped already are read without the kernel, so an access through mmap is seen
 * once per fault-around (64 KiB by default), and splice not at all.
 */
#include <linux/ftrace.h>
#include <linux/mm.h>
#include <linux/uio.h>

#include "call.h"
#include "hooks.h"

/* True when the policy has been told enough about this stretch. */
static bool pcb_within_step(struct pcb_tag *tag, u64 step, u64 index, u64 end)
{
	u64 last = READ_ONCE(tag->access_end);

	return step && index <= last && index + step > last && end < last + step && end >= last;
}

static void pcb_accessed(struct file *file, u32 kind, pgoff_t index, unsigned long nr)
{
	struct address_space *mapping = file->f_mapping;
	struct pcb_governance by;
	struct pcb_call call;

	rcu_read_lock();
	by = pcb_governance_of(mapping);
	if (by.ops && by.ops->access &&
	    !pcb_within_step(by.tag, by.ops->access_step_pages, index, index + nr)) {
		WRITE_ONCE(by.tag->access_end, index + nr);
		pcb_call_init(&call, &by, PAGECACHE_HOOK_ACCESS, mapping, file, index, nr);
		call.ctx.kind = kind;
		pcb_count(by.policy, access_calls, 1);
		by.ops->access(&call.ctx);
	}
	rcu_read_unlock();
}

static void notrace pcb_watch_read(unsigned long ip, unsigned long parent_ip,
				   struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct kiocb *iocb = (struct kiocb *)ftrace_regs_get_argument(fregs, 0);
	loff_t size;
	size_t count;
	int bit;

	if (!pcb_tag_possible(iocb->ki_filp->f_mapping->host))
		return;
	bit = ftrace_test_recursion_trylock(ip, parent_ip);
	if (bit < 0)
		return;
	count = iov_iter_count((struct iov_iter *)ftrace_regs_get_argument(fregs, 1));
	size = i_size_read(iocb->ki_filp->f_mapping->host);
	if (count && iocb->ki_pos >= 0 && iocb->ki_pos < size) {
		pgoff_t index = iocb->ki_pos >> PAGE_SHIFT;
		pgoff_t end =
			(min_t(u64, iocb->ki_pos + count, size) + PAGE_SIZE - 1) >> PAGE_SHIFT;

		pcb_accessed(iocb->ki_filp, PAGECACHE_KIND_READ, index, end - index);
	}
	ftrace_test_recursion_unlock(bit);
}

static __always_inline bool pcb_fault_possible(const struct vm_fault *vmf)
{
	const struct file *file = vmf->vma->vm_file;

	return file && pcb_tag_possible(file->f_mapping->host);
}

static void notrace pcb_watch_map(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
				  struct ftrace_regs *fregs)
{
	struct vm_fault *vmf = (struct vm_fault *)ftrace_regs_get_argument(fregs, 0);
	pgoff_t start, end;
	int bit;

	if (!pcb_fault_possible(vmf))
		return;
	bit = ftrace_test_recursion_trylock(ip, parent_ip);
	if (bit < 0)
		return;
	start = ftrace_regs_get_argument(fregs, 1);
	end = ftrace_regs_get_argument(fregs, 2);
	if (end >= start)
		pcb_accessed(vmf->vma->vm_file, PAGECACHE_KIND_MAP, start, end - start + 1);
	ftrace_test_recursion_unlock(bit);
}

static void notrace pcb_watch_fault(unsigned long ip, unsigned long parent_ip,
				    struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct vm_fault *vmf = (struct vm_fault *)ftrace_regs_get_argument(fregs, 0);
	int bit;

	if (!pcb_fault_possible(vmf))
		return;
	bit = ftrace_test_recursion_trylock(ip, parent_ip);
	if (bit < 0)
		return;
	/* Not the second try of a fault that had to drop the mmap lock. */
	if (!(vmf->flags & FAULT_FLAG_TRIED))
		pcb_accessed(vmf->vma->vm_file, PAGECACHE_KIND_TOUCH, vmf->pgoff, 1);
	ftrace_test_recursion_unlock(bit);
}

static struct pcb_ftrace pcb_watches[] = {
	{ .name = "filemap_read", .ops = { .func = pcb_watch_read } },
	{ .name = "filemap_map_pages", .ops = { .func = pcb_watch_map } },
	{ .name = "filemap_fault", .ops = { .func = pcb_watch_fault } },
};

static int pcb_access_prepare(void)
{
	return pcb_ftrace_prepare(pcb_watches, ARRAY_SIZE(pcb_watches));
}

static int pcb_access_on(const char **failed)
{
	int err = pcb_ftrace_on(pcb_watches, ARRAY_SIZE(pcb_watches));

	if (err)
		*failed = "access: ftrace refuses to watch the read and fault paths";
	return err;
}

static void pcb_access_off(void)
{
	pcb_ftrace_off(pcb_watches, ARRAY_SIZE(pcb_watches));
}

static void pcb_access_release(void)
{
	pcb_ftrace_release(pcb_watches, ARRAY_SIZE(pcb_watches));
}

struct pcb_hook_family pcb_access_hooks = {
	.name = "access",
	.hooks = BIT(PAGECACHE_HOOK_ACCESS),
	.prepare = pcb_access_prepare,
	.on = pcb_access_on,
	.off = pcb_access_off,
	.release = pcb_access_release,
};
