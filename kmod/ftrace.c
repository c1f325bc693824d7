// SPDX-License-Identifier: GPL-2.0-only
/*
 * ftrace.c - sets of kernel functions that are watched or redirected together.
 *
 * All of them are permanent (FTRACE_OPS_FL_PERMANENT), as livepatch's are: the sysctl
 * kernel.ftrace_enabled cannot be set to 0 while one is registered, and none can be registered
 * while it is 0.  What depends on a hook (that no inode goes unseen, for one) would be wrong
 * without it.  Since v7.3 the sysctl has no effect.
 */
#include "hooks.h"

static const int *pcb_ftrace_switch; /* ftrace_enabled; not exported */

/* Whether hooks are called: ftrace ends for good when it has found a fault in itself. */
bool pcb_ftrace_works(void)
{
	return !pcb_ftrace_switch || READ_ONCE(*pcb_ftrace_switch);
}

/*
 * Filters are set once and stay: an ftrace_ops without a filter would watch every function of the
 * kernel.
 */
int pcb_ftrace_prepare(struct pcb_ftrace *set, int n)
{
	int i, err;

	pcb_ftrace_switch = (const int *)pcb_symbol("ftrace_enabled");
	for (i = 0; i < n; i++) {
		set[i].ops.flags |= FTRACE_OPS_FL_PERMANENT;
		set[i].addr = pcb_symbol(set[i].name);
		err = pcb_prototype_check(set[i].name, set[i].prototype);
		if (!err) {
			err = set[i].addr ? ftrace_set_filter_ip(&set[i].ops, set[i].addr, 0, 0)
					  : -ENOENT;
			if (err)
				pr_err("%s: %s (%d)\n", set[i].name,
				       set[i].addr ? "ftrace cannot trace it"
						   : "not in this kernel",
				       err);
		}
		if (err) {
			pcb_ftrace_release(set, i);
			return err;
		}
	}
	return 0;
}

int pcb_ftrace_on(struct pcb_ftrace *set, int n)
{
	int i, err;

	for (i = 0; i < n; i++) {
		err = register_ftrace_function(&set[i].ops);
		if (err) {
			pr_err("%s: ftrace refuses it (%d)\n", set[i].name, err);
			pcb_ftrace_off(set, i);
			return err;
		}
	}
	return 0;
}

/*
 * The kernel may go on calling us, since ftrace has given up: the module stays where it is until
 * the next boot.
 */
void pcb_ftrace_stuck(const char *name, int err)
{
	WARN(1, "%s: ftrace does not let go of it (%d); the module cannot be unloaded any more\n",
	     name, err);
	__module_get(THIS_MODULE);
}

void pcb_ftrace_off(struct pcb_ftrace *set, int n)
{
	while (n--) {
		int err = unregister_ftrace_function(&set[n].ops);

		if (err)
			pcb_ftrace_stuck(set[n].name, err);
	}
}

/* The filters are gone for good: nothing can be turned on again. */
void pcb_ftrace_release(struct pcb_ftrace *set, int n)
{
	while (n--)
		ftrace_free_filter(&set[n].ops);
}
