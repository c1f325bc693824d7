// SPDX-License-Identifier: GPL-2.0-only
/*
 * direct.c - folio_referenced() by a direct call.
 *
 * ftrace saves the registers of the function it interrupts for whoever looks at them, which costs
 * reclaim several times what the look at an untagged folio does.  A direct call (v5.5, commit
 * 763e34e74bb7, "ftrace: Add register_ftrace_direct()"; this form since v6.4, commit 59495740f7ac)
 * goes to code that saves what it needs.  BPF uses the same for fentry; one function has room for
 * one, so hooks_evict.c falls back to an ordinary ftrace_ops.
 */
#include "hooks.h"
#include "hooks_evict.h"

#ifdef PCB_DIRECT

#include <asm/asm-offsets.h>
#include <asm/ibt.h>
#include <asm/nospec-branch.h>

void pcb_direct_referenced(void);
bool pcb_direct_wanted(const struct folio *folio, int is_locked);
bool pcb_direct_enter(void);

/*
 * The cheap test.  It leaves all registers but its result's as they are, so that the code below
 * need not save any for an untagged folio.
 */
__attribute__((no_caller_saved_registers)) notrace bool pcb_direct_wanted(const struct folio *folio,
									  int is_locked)
{
	return pcb_reclaim_asks(folio, is_locked);
}

notrace bool pcb_direct_enter(void)
{
	return percpu_ref_tryget_live(&pcb_active);
}

/*
 * In the place of folio_referenced()'s first instruction: on the stack lie the address to go on
 * with and the caller's.  The former is replaced for a folio that policies are to be asked about.
 */
/* clang-format off */
asm("	.pushsection	.text, \"ax\", @progbits\n"
    /* Bit 0 of the address says "jump" to newer kernels (ftrace_is_jmp()). */
    "	.balign	16\n"
    "	.type	pcb_direct_referenced, @function\n"
    "	.globl	pcb_direct_referenced\n"
    "pcb_direct_referenced:\n"
	ASM_ENDBR
    "	pushq	%rbp\n"
    "	movq	%rsp, %rbp\n"
	CALL_DEPTH_ACCOUNT
    "	call	pcb_direct_wanted\n"
    "	testb	%al, %al\n"
    "	jnz	1f\n"
    "	popq	%rbp\n"
	ASM_RET
    "1:	pushq	%rdi\n"
    "	pushq	%rsi\n"
    "	pushq	%rdx\n"
    "	pushq	%rcx\n"
    "	call	pcb_direct_enter\n"
    "	popq	%rcx\n"
    "	popq	%rdx\n"
    "	popq	%rsi\n"
    "	popq	%rdi\n"
    "	testb	%al, %al\n"
    "	jz	2f\n"
    "	leaq	pcb_folio_referenced(%rip), %rax\n"
    "	movq	%rax, 8(%rbp)\n"
    "2:	popq	%rbp\n"
	ASM_RET
    "	.size	pcb_direct_referenced, .-pcb_direct_referenced\n"
    "	.popsection\n");
/* clang-format on */

static struct ftrace_ops pcb_direct_ops;

/* The filter is set once and stays: ftrace_free_filter() leaves a pointer to what it has freed. */
int pcb_direct_prepare(unsigned long function)
{
	return ftrace_set_filter_ip(&pcb_direct_ops, function, 0, 0);
}

int pcb_direct_on(void)
{
	return register_ftrace_direct(&pcb_direct_ops, (unsigned long)pcb_direct_referenced);
}

/* Takes the direct call away, and waits for tasks that are in the code above. */
void pcb_direct_off(void)
{
	int err = unregister_ftrace_direct(&pcb_direct_ops, (unsigned long)pcb_direct_referenced,
					   false);

	if (err)
		pcb_ftrace_stuck("folio_referenced", err);
}

void pcb_direct_release(void)
{
	ftrace_free_filter(&pcb_direct_ops);
}

#else

int pcb_direct_prepare(unsigned long function)
{
	return 0;
}

int pcb_direct_on(void)
{
	return -EOPNOTSUPP;
}

void pcb_direct_off(void)
{
}

void pcb_direct_release(void)
{
}

#endif
