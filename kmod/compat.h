/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * compat.h - all kernel drift.  Kbuild probes the headers and defines PCB_HAVE_*; versions
 * are only named in comments.
 */
#ifndef PCB_COMPAT_H
#define PCB_COMPAT_H

#include <linux/btf.h>
#include <linux/fs.h>
#include <linux/ftrace.h>
#include <linux/pagemap.h>
#include <linux/rmap.h>
#if __has_include(<linux/folio_batch.h>)
#include <linux/folio_batch.h> /* v7.0 */
#else
#include <linux/pagevec.h>
#endif

#ifndef PCB_HAVE_STRUCT_OPS_LINK
#error "pagecache_bpf needs Linux 6.11 or later (bpf_struct_ops.reg with a link); engine agent runs on older ones"
#endif
#ifndef CONFIG_DYNAMIC_FTRACE_WITH_ARGS
#error "pagecache_bpf needs CONFIG_DYNAMIC_FTRACE_WITH_ARGS: hooks read arguments and move the instruction pointer"
#endif

/*
 * What is found by its name is called through a type of ours, and its arguments are taken from
 * registers: here the compiler compares that with the kernel's own declaration.  prototypes.c does
 * it again with the running kernel's BTF.
 */
#define pcb_check_prototype(function, ours) \
	static_assert(__same_type(function, ours), #function "() is declared differently here")

/*
 * v6.17 moved the folio order of readahead into struct file_ra_state (commit 276fa8c7ae68,
 * "mm/readahead: store folio order in struct file_ra_state"): page_cache_ra_order() lost its third
 * argument, and no longer adds 2 to it.  Here the order is the one that is meant.
 */
#ifdef PCB_HAVE_RA_ORDER_FIELD
#define PCB_RA_ORDER_ARGS struct readahead_control *ractl, struct file_ra_state *ra
#define pcb_ra_order_call(fn, ractl, ra, ord) ((ra)->order = (ord), (fn)(ractl, ra))
#define PCB_RA_ORDER_NAMES ractl, ra
#define PCB_RA_ORDER_PROTOTYPE "void(readahead_control *, file_ra_state *)"
#else
#define PCB_RA_ORDER_ARGS \
	struct readahead_control *ractl, struct file_ra_state *ra, unsigned int order
#define pcb_ra_order_call(fn, ractl, ra, ord) (fn)(ractl, ra, (ord) > 2 ? (ord) - 2 : 0)
#define PCB_RA_ORDER_NAMES ractl, ra, order
#define PCB_RA_ORDER_PROTOTYPE "void(readahead_control *, file_ra_state *, int32)"
#endif

/*
 * Direct calls from ftrace take an ftrace_ops since v6.4 (commit 59495740f7ac, "ftrace: Replace
 * uses of _ftrace_direct APIs with _ftrace_direct_multi"); the code that is called is per
 * architecture.
 */
#if defined(PCB_HAVE_DIRECT_OPS) && defined(CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS) && \
	defined(CONFIG_X86_64)
#define PCB_DIRECT
#endif

/* Prototype of folio_referenced(): its last argument is compared by the compiler. */
#define PCB_REFERENCED_PROTOTYPE "int32(folio *, int32, mem_cgroup *, pointer)"

/* v6.14 (commit 8026e49bff9b): what is read with RWF_DONTCACHE is dropped after use. */
#ifdef PCB_HAVE_DROPBEHIND
#define PCB_IOCB_DONTCACHE IOCB_DONTCACHE
#define pcb_ractl_dropbehind(ractl) ((ractl)->dropbehind)
#define pcb_ractl_set_dropbehind(ractl, value) ((ractl)->dropbehind = (value))
#else
#define PCB_IOCB_DONTCACHE 0
#define pcb_ractl_dropbehind(ractl) false
#define pcb_ractl_set_dropbehind(ractl, value) ((void)(value))
#endif

/* v7.3: folio_referenced() gives the flags of the mappings in a bitmap of a type of its own. */
#ifdef PCB_HAVE_VMA_FLAGS
typedef vma_flags_t pcb_vma_flags;
#define pcb_locked_by_mlock(flags) vma_flags_test(flags, VMA_LOCKED_BIT)
#else
typedef unsigned long pcb_vma_flags;
#define pcb_locked_by_mlock(flags) (*(flags) & VM_LOCKED)
#endif

/* v7.0 took the flag away: the arguments of every kfunc are trusted. */
#ifndef KF_TRUSTED_ARGS
#define KF_TRUSTED_ARGS 0
#endif

#endif /* PCB_COMPAT_H */
