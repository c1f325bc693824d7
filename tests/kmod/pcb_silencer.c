// SPDX-License-Identifier: GPL-2.0-only
/*
 * pcb_silencer - makes a hook of pagecache_bpf return at once
 *
 * The hook is attached then, and silent, as one is whose function the compiler has inlined: the
 * module has to notice that.
 */
#include <linux/kprobes.h>
#include <linux/module.h>

static char *hook = "";
module_param(hook, charp, 0444);

static noinline notrace void nothing(void)
{
	barrier();
}

/* Go on there, which returns to the caller. */
static int return_at_once(struct kprobe *probe, struct pt_regs *regs)
{
	instruction_pointer_set(regs, (unsigned long)nothing);
	return 1;
}

/* A probe with one may change the instruction pointer: it is not turned into a jump. */
static void never_called(struct kprobe *probe, struct pt_regs *regs, unsigned long flags)
{
}

static struct kprobe silencer = {
	.pre_handler = return_at_once,
	.post_handler = never_called,
};

static int __init silencer_init(void)
{
	silencer.symbol_name = hook;
	return register_kprobe(&silencer);
}

static void __exit silencer_exit(void)
{
	unregister_kprobe(&silencer);
}

module_init(silencer_init);
module_exit(silencer_exit);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("test of pagecache_bpf: makes one of its hooks silent");
