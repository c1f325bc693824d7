// SPDX-License-Identifier: GPL-2.0-only
/*
 * hooks_access.c - the access hook: a range of a tagged file is read or faulted.
 *
 * The functions are redirected: the policy runs in front of the original, where it may be preempted
 * and where the locks that its actions take may sleep (PREEMPT_RT); a callback of ftrace has
 * preemption off.  Tracepoints exist at about the same places, but they tell the mapping only; a
 * policy that prefetches needs the open file.  Pages that are mapped already are read without the
 * kernel, so an access through mmap is seen once per fault-around (64 KiB by default).
 */
#include <linux/ftrace.h>
#include <linux/mm.h>
#include <linux/splice.h>
#include <linux/uio.h>

#include "call.h"
#include "hooks.h"

/* True when the policy has been told enough about this stretch. */
static bool pcb_within_step(struct pcb_tag *tag, u64 step, u64 index, u64 end)
{
	u64 last = READ_ONCE(tag->access_end);

	return step && index <= last && index + step > last && end < last + step && end >= last;
}

static enum pcb_sight pcb_access_sight(u32 kind)
{
	return kind == PAGECACHE_KIND_READ    ? PCB_SIGHT_READ
	       : kind == PAGECACHE_KIND_TOUCH ? PCB_SIGHT_TOUCH
					      : PCB_SIGHT_NONE;
}

static void pcb_accessed(struct file *file, u32 kind, pgoff_t index, unsigned long nr, u32 flags)
{
	struct address_space *mapping = file->f_mapping;
	struct pcb_governance by;
	struct pcb_call call;

	rcu_read_lock();
	by = pcb_governance_of(mapping);
	if (by.tag) {
		pcb_saw(by.tag, pcb_access_sight(kind));
		pcb_tag_sync(&by, mapping);
	}
	if (by.ops && by.ops->access &&
	    !pcb_within_step(by.tag, by.ops->access_step_bytes >> PAGE_SHIFT, index, index + nr)) {
		WRITE_ONCE(by.tag->access_end, index + nr);
		pcb_call_init(&call, &by, PAGECACHE_HOOK_ACCESS, mapping, file, index, nr);
		call.ctx.kind = kind;
		call.ctx.flags |= flags;
		pcb_count(by.policy, access_calls, 1);
		by.ops->access(&call.ctx);
		pcb_policy_took(by.policy, PAGECACHE_HOOK_ACCESS, call.ctx.time_ns);
	}
	rcu_read_unlock();
}

static void pcb_read_accessed(struct file *file, loff_t pos, size_t count, u32 flags)
{
	loff_t size = i_size_read(file->f_mapping->host);
	pgoff_t index, end;

	if (!count || pos < 0 || pos >= size)
		return;
	index = pos >> PAGE_SHIFT;
	end = (min_t(u64, pos + count, size) + PAGE_SIZE - 1) >> PAGE_SHIFT;
	pcb_accessed(file, PAGECACHE_KIND_READ, index, end - index, flags);
}

static u32 pcb_flags_of(const struct kiocb *iocb)
{
	u32 flags = 0;

	if (iocb->ki_flags & IOCB_NOWAIT)
		flags |= PAGECACHE_F_NOWAIT;
	if (iocb->ki_flags & PCB_IOCB_DONTCACHE)
		flags |= PAGECACHE_F_DONTCACHE;
	return flags;
}

static void pcb_fault_accessed(const struct vm_fault *vmf, u32 kind, pgoff_t index,
			       unsigned long nr)
{
	pcb_accessed(vmf->vma->vm_file, kind, index, nr,
		     vmf->vma->vm_flags & VM_RAND_READ ? PAGECACHE_F_RANDOM : 0);
}

static noinline ssize_t pcb_filemap_read(struct kiocb *iocb, struct iov_iter *iter, ssize_t done)
{
	ssize_t ret;

	pcb_read_accessed(iocb->ki_filp, iocb->ki_pos, iov_iter_count(iter), pcb_flags_of(iocb));
	ret = filemap_read(iocb, iter, done);
	percpu_ref_put(&pcb_active);
	return ret;
}

/* splice(2) and sendfile(2), which ask for what the pipe has room for. */
static noinline ssize_t pcb_filemap_splice_read(struct file *in, loff_t *ppos,
						struct pipe_inode_info *pipe, size_t len,
						unsigned int flags)
{
	ssize_t ret;

	pcb_read_accessed(in, *ppos, len, 0);
	ret = filemap_splice_read(in, ppos, pipe, len, flags);
	percpu_ref_put(&pcb_active);
	return ret;
}

static noinline vm_fault_t pcb_filemap_map_pages(struct vm_fault *vmf, pgoff_t start, pgoff_t end)
{
	vm_fault_t ret;

	if (end >= start)
		pcb_fault_accessed(vmf, PAGECACHE_KIND_MAP, start, end - start + 1);
	ret = filemap_map_pages(vmf, start, end);
	percpu_ref_put(&pcb_active);
	return ret;
}

static noinline vm_fault_t pcb_filemap_fault(struct vm_fault *vmf)
{
	vm_fault_t ret;

	/* Not the second try of a fault that had to drop the mmap lock. */
	if (!(vmf->flags & FAULT_FLAG_TRIED))
		pcb_fault_accessed(vmf, PAGECACHE_KIND_TOUCH, vmf->pgoff, 1);
	ret = filemap_fault(vmf);
	percpu_ref_put(&pcb_active);
	return ret;
}

pcb_check_prototype(filemap_read, pcb_filemap_read);
pcb_check_prototype(filemap_splice_read, pcb_filemap_splice_read);
pcb_check_prototype(filemap_map_pages, pcb_filemap_map_pages);
pcb_check_prototype(filemap_fault, pcb_filemap_fault);

static void notrace pcb_redirect_read(unsigned long ip, unsigned long parent_ip,
				      struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct kiocb *iocb = (struct kiocb *)ftrace_regs_get_argument(fregs, 0);

	if (!pcb_tag_possible(iocb->ki_filp->f_mapping->host))
		return;
	pcb_unless_recursing(ip, parent_ip) pcb_redirect_to(ops->private, parent_ip, fregs);
}

static void notrace pcb_redirect_splice(unsigned long ip, unsigned long parent_ip,
					struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	const struct file *file = (const struct file *)ftrace_regs_get_argument(fregs, 0);

	if (!pcb_tag_possible(file->f_mapping->host))
		return;
	pcb_unless_recursing(ip, parent_ip) pcb_redirect_to(ops->private, parent_ip, fregs);
}

static void notrace pcb_redirect_fault(unsigned long ip, unsigned long parent_ip,
				       struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct vm_fault *vmf = (struct vm_fault *)ftrace_regs_get_argument(fregs, 0);
	const struct file *file = vmf->vma->vm_file;

	if (!file || !pcb_tag_possible(file->f_mapping->host))
		return;
	pcb_unless_recursing(ip, parent_ip) pcb_redirect_to(ops->private, parent_ip, fregs);
}

static struct pcb_ftrace pcb_access_redirections[] = {
	PCB_REDIRECT("filemap_read", "int64(kiocb *, iov_iter *, int64)", pcb_redirect_read,
		     pcb_filemap_read),
	/* File systems have it in their tables: no compiler inlines it, and no canary is needed. */
	PCB_REDIRECT("filemap_splice_read",
		     "int64(file *, pointer, pipe_inode_info *, int64, int32)", pcb_redirect_splice,
		     pcb_filemap_splice_read),
	PCB_REDIRECT("filemap_map_pages", "int32(vm_fault *, int64, int64)", pcb_redirect_fault,
		     pcb_filemap_map_pages),
	PCB_REDIRECT("filemap_fault", "int32(vm_fault *)", pcb_redirect_fault, pcb_filemap_fault),
};

static int pcb_access_prepare(void)
{
	return pcb_ftrace_prepare(pcb_access_redirections, ARRAY_SIZE(pcb_access_redirections));
}

static int pcb_access_on(const char **failed)
{
	int err = pcb_ftrace_on(pcb_access_redirections, ARRAY_SIZE(pcb_access_redirections));

	if (err == -EBUSY)
		*failed = "access: a function is redirected already (by a live patch?)";
	else if (err)
		*failed = "access: ftrace refuses to redirect the read and fault paths";
	return err;
}

static void pcb_access_off(void)
{
	pcb_ftrace_off(pcb_access_redirections, ARRAY_SIZE(pcb_access_redirections));
}

static void pcb_access_release(void)
{
	pcb_ftrace_release(pcb_access_redirections, ARRAY_SIZE(pcb_access_redirections));
}

struct pcb_hook_family pcb_access_hooks = {
	.name = "access",
	.hooks = BIT(PAGECACHE_HOOK_ACCESS),
	.prepare = pcb_access_prepare,
	.on = pcb_access_on,
	.off = pcb_access_off,
	.release = pcb_access_release,
};
