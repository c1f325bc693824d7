// SPDX-License-Identifier: GPL-2.0-only
/*
 * symbols.c - finds what the kernel does not export: functions, and tracepoints by their name.
 *
 * kallsyms_lookup_name() itself has not been exported since v5.7 (commit 0bd476e6c671); a
 * kprobe that is registered and removed at once tells its address.  Everything found
 * is called through static calls, never through pointers: an indirect call would fault
 * on machines with indirect branch tracking, where functions that nobody takes the
 * address of have lost their landing pad.
 */
#include <linux/kallsyms.h>
#include <linux/kprobes.h>
#include <linux/static_call.h>

#include "hooks.h"

static unsigned long pcb_no_lookup(const char *name)
{
	return 0;
}

static int pcb_no_size(unsigned long addr, unsigned long *size, unsigned long *offset)
{
	return 0;
}

DEFINE_STATIC_CALL(pcb_lookup_name, pcb_no_lookup);
DEFINE_STATIC_CALL(pcb_lookup_size, pcb_no_size);

int pcb_symbols_init(void)
{
	struct kprobe kp = { .symbol_name = "kallsyms_lookup_name" };
	unsigned long addr;
	int err;

	err = register_kprobe(&kp);
	if (err) {
		pr_err("kallsyms_lookup_name: no kprobe (%d); needs CONFIG_KPROBES\n", err);
		return err;
	}
	/* The address may be that behind an ENDBR instruction, which a direct call can skip. */
	addr = (unsigned long)kp.addr;
	unregister_kprobe(&kp);
	static_call_update(pcb_lookup_name, (typeof(&pcb_no_lookup))addr);

	addr = pcb_symbol("kallsyms_lookup_size_offset");
	if (!addr)
		return -ENOENT;
	static_call_update(pcb_lookup_size, (typeof(&pcb_no_size))addr);
	return 0;
}

unsigned long pcb_symbol(const char *name)
{
	return static_call(pcb_lookup_name)(name);
}

/* Finds where the code of functions lies.  Returns how many of them there are. */
int pcb_code_find(struct pcb_code *parts, int n)
{
	unsigned long size, offset;
	int i, found = 0;

	for (i = 0; i < n; i++) {
		parts[i].start = pcb_symbol(parts[i].name);
		if (!parts[i].start ||
		    !static_call(pcb_lookup_size)(parts[i].start, &size, &offset))
			continue;
		parts[i].end = parts[i].start + size;
		found++;
	}
	return found;
}

bool notrace pcb_code_has(const struct pcb_code *parts, int n, unsigned long ip)
{
	int i;

	for (i = 0; i < n; i++) {
		if (ip >= parts[i].start && ip < parts[i].end)
			return true;
	}
	return false;
}

struct pcb_tracepoint_search {
	const char *name;
	struct tracepoint *found;
};

static void pcb_match_tracepoint(struct tracepoint *tp, void *data)
{
	struct pcb_tracepoint_search *search = data;

	if (!strcmp(tp->name, search->name))
		search->found = tp;
}

/*
 * Finds a tracepoint: they are not exported by name, but the list of all of them is.  NULL: there
 * is none of that name, or its arguments are others.
 */
struct tracepoint *pcb_tracepoint(const char *name, const char *prototype)
{
	struct pcb_tracepoint_search search = { .name = name };

	if (pcb_tracepoint_check(name, prototype))
		return NULL;
	for_each_kernel_tracepoint(pcb_match_tracepoint, &search);
	return search.found;
}
