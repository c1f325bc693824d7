/* SPDX-License-Identifier: GPL-2.0-only */
/* hooks.h - how the module gets into the kernel's functions, and out of them again. */
#ifndef PCB_HOOKS_H
#define PCB_HOOKS_H

#include <linux/ftrace.h>
#include <linux/module.h>
#include <linux/percpu-refcount.h>
#include <linux/tracepoint.h>

#include "compat.h"
#include "params.h"
#include "pagecache_abi.h"

#define PCB_ANY_HOOK (~0U)

/*
 * A family of hooks that are attached together.  prepare finds what it needs when the module is
 * loaded; on and off follow the policies; release is the module's end.
 */
struct pcb_hook_family {
	const char *name;
	u32 hooks; /* wanted by policies with one of these; 0: not by policies */
	int (*prepare)(void);
	int (*on)(const char **failed);
	void (*off)(void);
	void (*release)(void);
	unsigned int users;
};

extern struct pcb_hook_family pcb_readahead_hooks; /* hooks_readahead.c */
extern struct pcb_hook_family pcb_access_hooks; /* hooks_access.c */
extern struct pcb_hook_family pcb_cache_hooks; /* hooks_cache.c */
extern struct pcb_hook_family pcb_umount_hooks; /* hooks_umount.c */
extern struct pcb_hook_family pcb_evict_hooks; /* hooks_evict.c */
extern struct pcb_hook_family pcb_pressure_hooks; /* hooks_pressure.c */
extern struct pcb_hook_family pcb_super_hooks; /* hooks_super.c */
extern bool pcb_evict_possible, pcb_pressure_possible; /* on this kernel */

/* hooks.c: on while at least one policy is attached */
int pcb_hooks_prepare(void);
void pcb_hooks_release(void);
int pcb_hooks_get(u32 wanted, const char **failed);
void pcb_hooks_put(u32 wanted);
u32 pcb_hooks_available(void);
int pcb_hooks_hold_family(struct pcb_hook_family *family);
void pcb_hooks_release_family(struct pcb_hook_family *family);

/* symbols.c: what the kernel does not export */
int pcb_symbols_init(void);
unsigned long pcb_symbol(const char *name); /* 0: not there */

/* The code of some functions, to tell who has called us. */
struct pcb_code {
	const char *name;
	unsigned long start, end; /* 0: not there */
};

int pcb_code_find(struct pcb_code *parts, int n);
bool pcb_code_has(const struct pcb_code *parts, int n, unsigned long ip);

struct tracepoint *pcb_tracepoint(const char *name, const char *prototype);

/* prototypes.c: are they what the module was built for? */
struct btf;
int pcb_prototypes_init(void);
int pcb_prototype_check(const char *name, const char *expected);
int pcb_tracepoint_check(const char *name, const char *expected);
s32 pcb_btf_find_id(const struct btf *btf, const char *name, u8 kind);
const char *pcb_btf_name_of(const struct btf *btf, u32 offset);

/* ftrace.c: a set of kernel functions that are watched or redirected together */
struct pcb_ftrace {
	const char *name;
	const char *prototype; /* see pcb_prototype_check() */
	unsigned long addr;
	struct ftrace_ops ops;
};

bool pcb_ftrace_works(void);
void pcb_ftrace_stuck(const char *name, int err);
int pcb_ftrace_prepare(struct pcb_ftrace *set, int n);
int pcb_ftrace_on(struct pcb_ftrace *set, int n);
void pcb_ftrace_off(struct pcb_ftrace *set, int n);
void pcb_ftrace_release(struct pcb_ftrace *set, int n);

/* Entry of a set: @callback moves the instruction pointer to @ours, which it finds in private. */
#define PCB_REDIRECT(function, proto, callback, ours)                                         \
	{                                                                                     \
		.name = function, .prototype = proto,                                         \
		.ops = { .func = callback, .private = ours, .flags = FTRACE_OPS_FL_IPMODIFY } \
	}

/* direct.c: folio_referenced() leads to pcb_folio_referenced() by a direct call */
int pcb_direct_prepare(unsigned long function);
int pcb_direct_on(void);
void pcb_direct_off(void);
void pcb_direct_release(void);

/*
 * A task whose instruction pointer was moved into the module may sleep there.  The reference is
 * taken before the move, and dropped as the last act of our function; unloading waits for all of
 * them (main.c).
 */
extern struct percpu_ref pcb_active;

/* The block runs unless ftrace has come back to where it is already; with preemption off. */
#define pcb_unless_recursing(ip, parent_ip)                                            \
	for (int pcb_bit = ftrace_test_recursion_trylock(ip, parent_ip); pcb_bit >= 0; \
	     ftrace_test_recursion_unlock(pcb_bit), pcb_bit = -1)

/*
 * In a callback of ftrace: go on in @ours instead of the function, but when the module is about to
 * be unloaded.
 */
static __always_inline void pcb_redirect_anyone(void *ours, struct ftrace_regs *fregs)
{
	if (percpu_ref_tryget_live(&pcb_active))
		ftrace_regs_set_instruction_pointer(fregs, (unsigned long)ours);
}

/* pcb_redirect_anyone(), but for our own calls of the original, which go through. */
static __always_inline void pcb_redirect_to(void *ours, unsigned long parent_ip,
					    struct ftrace_regs *fregs)
{
	if (!within_module(parent_ip, THIS_MODULE))
		pcb_redirect_anyone(ours, fregs);
}

#endif /* PCB_HOOKS_H */
