// SPDX-License-Identifier: GPL-2.0-only
/*
 * hooks_umount.c - lets go of files before an unmount looks for users.
 *
 * A prefetch in flight holds its reader's file.  When the reader has closed it and the
 * file system is unmounted at once, that reference alone would make umount(2) fail with
 * EBUSY, which counts the users of the mount.  security_sb_umount() is the first thing do_umount()
 * calls; what is queued is cancelled and what is being submitted is waited for (milliseconds) in
 * front of it. Without this hook everything else works, and an unmount may have to be repeated.
 */
#include <linux/ftrace.h>
#include <linux/mount.h>
#include <linux/security.h>
#include <linux/static_call.h>

#include "streams.h"
#include "hooks.h"

static int pcb_no_umount(struct vfsmount *mnt, int flags)
{
	return 0;
}

pcb_check_prototype(security_sb_umount, pcb_no_umount);
DEFINE_STATIC_CALL(pcb_security_sb_umount, pcb_no_umount);

static bool pcb_umount_found, pcb_umount_watched;

static noinline int pcb_umount(struct vfsmount *mnt, int flags)
{
	int ret;

	/* Both go through whoever uses the file system; nothing has to be waited for. */
	if (!(flags & (MNT_DETACH | MNT_FORCE)))
		pcb_drain_mount(mnt);
	ret = static_call(pcb_security_sb_umount)(mnt, flags);
	percpu_ref_put(&pcb_active);
	return ret;
}

static void notrace pcb_redirect_umount(unsigned long ip, unsigned long parent_ip,
					struct ftrace_ops *ops, struct ftrace_regs *fregs)
{
	pcb_redirect_to(pcb_umount, parent_ip, fregs);
}

static struct pcb_ftrace pcb_umount_redirection = {
	.name = "security_sb_umount",
	.prototype = "int32(vfsmount *, int32)",
	.ops = { .func = pcb_redirect_umount,
		 .flags = FTRACE_OPS_FL_IPMODIFY | FTRACE_OPS_FL_RECURSION },
};

/* Unlike the others, this hook is not worth failing for. */
static int pcb_umount_prepare(void)
{
	pcb_umount_found = !pcb_ftrace_prepare(&pcb_umount_redirection, 1);
	if (pcb_umount_found)
		static_call_update(pcb_security_sb_umount,
				   (typeof(&pcb_no_umount))pcb_umount_redirection.addr);
	return 0;
}

static int pcb_umount_on(const char **failed)
{
	pcb_umount_watched = pcb_umount_found && !pcb_ftrace_on(&pcb_umount_redirection, 1);
	if (!pcb_umount_watched)
		pr_warn("unmount is not watched: it may say EBUSY right after a load\n");
	return 0;
}

static void pcb_umount_off(void)
{
	if (pcb_umount_watched)
		pcb_ftrace_off(&pcb_umount_redirection, 1);
}

static void pcb_umount_release(void)
{
	if (pcb_umount_found)
		pcb_ftrace_release(&pcb_umount_redirection, 1);
}

struct pcb_hook_family pcb_umount_hooks = {
	.name = "umount",
	.hooks = PCB_ANY_HOOK,
	.prepare = pcb_umount_prepare,
	.on = pcb_umount_on,
	.off = pcb_umount_off,
	.release = pcb_umount_release,
};
