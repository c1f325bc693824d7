// SPDX-License-Identifier: GPL-2.0-only
/* ftrace.c - sets of kernel functions that are watched or redirected together. */
#include "hooks.h"

/*
 * Filters are set once and stay: an ftrace_ops without a filter would watch every function of the
 * kernel.
 */
int pcb_ftrace_prepare(struct pcb_ftrace *set, int n)
{
	int i, err;

	for (i = 0; i < n; i++) {
		set[i].addr = pcb_symbol(set[i].name);
		err = set[i].addr ? ftrace_set_filter_ip(&set[i].ops, set[i].addr, 0, 0) : -ENOENT;
		if (err) {
			pr_err("%s: %s (%d)\n", set[i].name,
			       set[i].addr ? "ftrace cannot trace it" : "not in this kernel", err);
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

void pcb_ftrace_off(struct pcb_ftrace *set, int n)
{
	while (n--)
		unregister_ftrace_function(&set[n].ops);
}

/* The filters are gone for good: nothing can be turned on again. */
void pcb_ftrace_release(struct pcb_ftrace *set, int n)
{
	while (n--)
		ftrace_free_filter(&set[n].ops);
}
