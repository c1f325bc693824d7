// SPDX-License-Identifier: GPL-2.0-only
/*
 * pcb_blocker - redirects a kernel function to itself, as a live patch would
 *
 * Nobody else can redirect it then: a policy with the hook behind it must be refused, with the name
 * of the hook and the reason.
 */
#include <linux/ftrace.h>
#include <linux/module.h>

static char *function = "folio_referenced";
module_param(function, charp, 0444);

static void notrace leave_alone(unsigned long ip, unsigned long parent_ip, struct ftrace_ops *ops,
				struct ftrace_regs *fregs)
{
}

static struct ftrace_ops blocker = { .func = leave_alone, .flags = FTRACE_OPS_FL_IPMODIFY };

static int __init blocker_init(void)
{
	int err = ftrace_set_filter(&blocker, function, strlen(function), 0);

	return err ?: register_ftrace_function(&blocker);
}

static void __exit blocker_exit(void)
{
	unregister_ftrace_function(&blocker);
	ftrace_free_filter(&blocker);
}

module_init(blocker_init);
module_exit(blocker_exit);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("test of pagecache_bpf: takes a function that it needs");
