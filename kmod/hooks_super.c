// SPDX-License-Identifier: GPL-2.0-only
/*
 * hooks_super.c - tags of file systems without a device end with them.
 *
 * Such a file system (NFS, FUSE, btrfs) has a device number that is given to another one as soon as
 * it has gone (get_anon_bdev() in fs/super.c): a tag that outlived it would govern somebody else's
 * file, whose inode number and generation FUSE lets the user choose.  generic_shutdown_super(),
 * which each goes through before it gives its number back, is redirected while there are such tags.
 */
#include <linux/fs.h>
#include <linux/kdev_t.h>

#include "hooks.h"
#include "tags.h"

static noinline void pcb_shutdown_super(struct super_block *sb)
{
	pcb_tags_drop_device(sb->s_dev);
	generic_shutdown_super(sb);
	percpu_ref_put(&pcb_active);
}

pcb_check_prototype(generic_shutdown_super, pcb_shutdown_super);

static void notrace pcb_redirect_shutdown(unsigned long ip, unsigned long parent_ip,
					  struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	struct super_block *sb = (struct super_block *)ftrace_regs_get_argument(fregs, 0);

	if (MAJOR(sb->s_dev))
		return;
	pcb_unless_recursing(ip, parent_ip) pcb_redirect_to(ops->private, parent_ip, fregs);
}

static struct pcb_ftrace pcb_super_redirection = PCB_REDIRECT(
	"generic_shutdown_super", "void(super_block *)", pcb_redirect_shutdown, pcb_shutdown_super);

static int pcb_super_prepare(void)
{
	return pcb_ftrace_prepare(&pcb_super_redirection, 1);
}

static int pcb_super_on(const char **failed)
{
	int err = pcb_ftrace_works() ? pcb_ftrace_on(&pcb_super_redirection, 1) : -EBUSY;

	if (err)
		*failed = "ftrace refuses to redirect generic_shutdown_super";
	return err;
}

static void pcb_super_off(void)
{
	pcb_ftrace_off(&pcb_super_redirection, 1);
}

static void pcb_super_release(void)
{
	pcb_ftrace_release(&pcb_super_redirection, 1);
}

struct pcb_hook_family pcb_super_hooks = {
	.name = "the end of file systems",
	.prepare = pcb_super_prepare,
	.on = pcb_super_on,
	.off = pcb_super_off,
	.release = pcb_super_release,
};
